"""The engine as a process: a real small model, real commands over a real socketpair, compared with transformers."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from coordinator.messages import KVRank, TopLogprobs, pack_ids
from coordinator.sampling import SamplingParams
from workers.channel import BlockingChannel
from workers.engine_link import EngineLink
from workers.engine_messages import (
    Activate,
    AddSequence,
    Cancel,
    Command,
    Event,
    Failed,
    Imported,
    ImportSequence,
    Pinned,
    Progress,
    Ready,
    ReleasePin,
    Shutdown,
    Stats,
    Tokens,
    decode_event,
    encode,
)
from workers.random_model import write_random_model
from workers.settings import EngineSettings

VOCAB_SIZE, PAGE_SIZE, NUM_PAGES, CHUNK_SIZE = 512, 8, 128, 24
job_numbers = count()


@dataclass
class Answer:
    """What one job produced."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    cached_tokens: int = -1
    tops: list[TopLogprobs | None] = field(default_factory=list)


class EngineProcess:
    """A started engine and our end of its channel. Events are read in order, whatever is asked for."""

    ready: Ready

    def __init__(self, model_dir: Path, role: str, **settings: Any) -> None:
        ours, theirs = socket.socketpair()
        values = {"model_dir": str(model_dir), "model_name": "tiny", "role": role, "page_size": PAGE_SIZE, "num_threads": 1,
                  "max_total_token_num": PAGE_SIZE * NUM_PAGES, "chunked_prefill_size": CHUNK_SIZE, "running_max_req_size": 8, **settings}
        self.process = start(theirs, values)
        theirs.close()
        self.channel = BlockingChannel(ours)
        self._events = map(decode_event, self.channel)
        self.answers: dict[str, Answer] = {}
        self._replaced: set[str] = set()      # their first life may have said something before the second began

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.channel.send(encode(command))

    def replace(self, first: AddSequence, second: AddSequence) -> None:
        """Both at once, of one job id."""
        self._replaced.add(first.job_id)
        self.send(first, second)

    def wait_for(self, kind: type[Any], job_id: str | None = None) -> Any:
        """The next event of this kind (about this job); token rows on the way are collected."""
        for event in self._events:
            self._take(event)
            if isinstance(event, kind) and (job_id is None or event.job_id == job_id):
                return event
        raise AssertionError(f"the engine ended before {kind.__name__}")

    def wait_for_tokens(self, job_id: str, at_least: int) -> None:
        while len(self.answers.setdefault(job_id, Answer()).token_ids) < at_least:
            self.wait_for(Tokens)

    def wait_for_finish(self, *job_ids: str) -> list[Answer]:
        while not all(job_id in self.answers and self.answers[job_id].finish for job_id in job_ids):
            self.wait_for(Tokens)
        return [self.answers[job_id] for job_id in job_ids]

    def wait_until_nothing_is_held(self) -> None:
        self.generate([5], max_new_tokens=1)  # its end makes the engine tell its state, after all commands sent before
        while True:
            stats: Stats = self.wait_for(Stats)
            if not (stats.held_pages or stats.pinned or stats.running or stats.waiting or stats.importing):
                break
        assert stats.free_pages + stats.cached_pages == NUM_PAGES
        assert stats.free_tokens == NUM_PAGES * PAGE_SIZE

    def _take(self, event: Event) -> None:
        if isinstance(event, Ready):
            self.ready = event
        if isinstance(event, Tokens):
            for prefilled in event.prefilled:
                self.answers.setdefault(prefilled.job_id, Answer()).cached_tokens = prefilled.cached_tokens
            for row in event.rows:
                answer = self.answers.setdefault(row.job_id, Answer())
                if row.job_id in self._replaced and row.output_index == 0 and answer.token_ids:
                    self._replaced.remove(row.job_id)
                    answer = self.answers[row.job_id] = Answer()
                assert answer.finish is None, "a row after the last one"
                assert row.output_index == len(answer.token_ids)
                answer.token_ids.append(row.token_id)
                answer.logprobs.append(row.logprob)
                answer.finish = row.finish
                answer.tops.append(row.top_logprobs)

    def generate(self, *prompts: list[int], **params: Any) -> list[Answer]:
        """All at once, to their ends."""
        jobs = [add(prompt, **params) for prompt in prompts]
        self.send(*jobs)
        return self.wait_for_finish(*(job.job_id for job in jobs))

    def stop(self) -> int:
        self.send(Shutdown())
        status = self.process.wait(timeout=60)
        self.channel.close()
        return status


def start(end: socket.socket, settings: dict[str, Any], **options: Any) -> subprocess.Popen[Any]:
    argv = [sys.executable, "-m", "workers.engine", "--fd", str(end.fileno()), "--settings", json.dumps(settings), "--check"]
    return subprocess.Popen(argv, pass_fds=[end.fileno()], **options)


def add(token_ids: list[int], *, num_prompt: int | None = None, **params: Any) -> AddSequence:
    values = {"max_new_tokens": 12, "ignore_eos": True, **params}
    return AddSequence(job_id=f"job-{next(job_numbers)}", token_ids=pack_ids(token_ids), num_prompt=num_prompt or len(token_ids),
                       params=SamplingParams(**values))


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(5, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def engines(model_dir: Path) -> Iterator[dict[str, EngineProcess]]:
    with running(model_dir, depth=1) as started:
        yield started


@pytest.fixture(scope="module")
def overlapped_engines(model_dir: Path) -> Iterator[dict[str, EngineProcess]]:
    """Engines that prepare a step while the one before runs, as on a GPU."""
    with running(model_dir, depth=2) as started:
        yield started


@contextmanager
def running(model_dir: Path, **settings: Any) -> Iterator[dict[str, EngineProcess]]:
    started = {role: EngineProcess(model_dir, role, **settings) for role in ("both", "prefill", "decode")}
    try:
        for engine in started.values():
            engine.wait_for(Ready)
        yield started
        assert [engine.stop() for engine in started.values()] == [0, 0, 0]
    finally:
        for engine in started.values():
            engine.process.kill()
            engine.process.wait()


@pytest.fixture
def both(engines: dict[str, EngineProcess]) -> EngineProcess:
    return engines["both"]


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def greedy(oracle: LlamaForCausalLM, prompt: list[int], num_tokens: int = 12) -> Answer:
    answer = Answer(finish="length")
    with torch.inference_mode():
        for _ in range(num_tokens):
            logprobs = oracle(torch.tensor([prompt + answer.token_ids])).logits[0, -1].log_softmax(-1)
            answer.token_ids.append(int(logprobs.argmax()))
            answer.logprobs.append(float(logprobs.max()))
    return answer


def assert_same(ours: Answer, expected: Answer) -> None:
    assert (ours.token_ids, ours.finish) == (expected.token_ids, expected.finish)
    assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


# ---- equal to transformers ----


@pytest.mark.parametrize("length", [1, CHUNK_SIZE, CHUNK_SIZE + 1, 100])
def test_greedy_output_equals_transformers_for_whole_and_chunked_prompts(both: EngineProcess, oracle: LlamaForCausalLM,
                                                                         length: int) -> None:
    prompt = prompt_of(length, seed=length)
    (answer,) = both.generate(prompt)
    assert_same(answer, greedy(oracle, prompt))


def test_a_cached_prefix_changes_the_work_but_not_the_answer(both: EngineProcess, oracle: LlamaForCausalLM) -> None:
    prompt = prompt_of(50, seed=1)
    first, = both.generate(prompt)
    again, = both.generate(prompt)
    longer, = both.generate(prompt + first.token_ids + [9, 8, 7])
    assert (first.cached_tokens, again.cached_tokens, longer.cached_tokens) == (0, 48, 56)
    assert_same(first, greedy(oracle, prompt))
    assert_same(again, first)
    assert_same(longer, greedy(oracle, prompt + first.token_ids + [9, 8, 7]))


def test_a_mixed_batch_gives_each_prompt_its_own_answer(both: EngineProcess, oracle: LlamaForCausalLM) -> None:
    shared = prompt_of(20, seed=2)
    prompts = [prompt_of(length, seed=length) for length in (3, 70, 9, 33, 1)] + [[*shared, 4 + i] for i in range(6)]
    for prompt, answer in zip(prompts, both.generate(*prompts), strict=True):
        assert_same(answer, greedy(oracle, prompt))
    both.wait_until_nothing_is_held()


def test_a_resumed_sequence_goes_on_as_if_never_interrupted(both: EngineProcess) -> None:
    prompt = prompt_of(10, seed=3)
    params = {"do_sample": True, "seed": 99, "top_p": 0.95, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    whole, = both.generate(prompt, **params)
    rest = add(prompt + whole.token_ids[:5], num_prompt=10, **params)
    both.answers[rest.job_id] = Answer(token_ids=whole.token_ids[:5], logprobs=whole.logprobs[:5])
    both.send(rest)
    resumed, = both.wait_for_finish(rest.job_id)
    assert_same(resumed, whole)


def test_eos_ends_a_sequence_and_is_its_last_row(both: EngineProcess) -> None:
    (eos,) = both.ready.eos_ids
    answer, = both.generate([5, 6, 7], ignore_eos=False, allowed_token_ids=(eos,))
    assert (answer.token_ids, answer.finish) == ([eos], "stop")
    ignored, = both.generate([5, 6, 7], allowed_token_ids=(eos,), max_new_tokens=3)
    assert (ignored.token_ids, ignored.finish) == ([eos] * 3, "length")


def test_more_sequences_than_fit_at_once_all_finish(both: EngineProcess) -> None:
    answers = both.generate(*(prompt_of(60, seed=100 + i) for i in range(24)), max_new_tokens=30)
    assert all(len(answer.token_ids) == 30 for answer in answers)
    both.wait_until_nothing_is_held()


# ---- prefill and decode in two processes ----


def hand_over(engines: dict[str, EngineProcess], job: AddSequence, prompt: list[int]) -> Answer:
    """What the two I/O processes do: prefill, import, confirm, activate, release. Returns the whole answer."""
    prefill, decode = engines["prefill"], engines["decode"]
    prefill.send(job)
    prefill.wait_for_tokens(job.job_id, 1)
    answer = prefill.answers[job.job_id]
    if answer.finish:
        return answer
    pinned: Pinned = prefill.wait_for(Pinned, job.job_id)
    ready = prefill.ready
    decode.send(ImportSequence(job_id=job.job_id, token_ids=pack_ids(prompt + answer.token_ids), num_prompt=len(prompt), params=job.params,
                               num_kv_tokens=pinned.num_tokens, source=ready.pool, page_ids=pinned.page_ids, layout=ready.layout))
    assert decode.wait_for(Imported, job.job_id).ok
    decode.answers[job.job_id] = Answer(token_ids=list(answer.token_ids), logprobs=list(answer.logprobs))
    decode.send(Activate(job_id=job.job_id))
    prefill.send(ReleasePin(job_id=job.job_id))
    whole, = decode.wait_for_finish(job.job_id)
    return whole


@pytest.mark.parametrize("params", [
    {},
    {"do_sample": True, "seed": 2**63 + 5, "temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.2, "input_penalty": True},
    {"do_sample": True, "seed": 4, "frequency_penalty": 1.0, "min_new_tokens": 6, "ignore_eos": False},
    {"exponential_decay_length_penalty": (2, 1.5), "ignore_eos": False},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"allowed_token_ids": (1,), "ignore_eos": False},
    {"stop_sequences": ((300, 301),), "allowed_token_ids": (300, 301), "do_sample": True, "seed": 1},
], ids=lambda params: " ".join(params) or "greedy")
def test_prefill_and_decode_in_two_processes_equal_one(engines: dict[str, EngineProcess], params: dict[str, Any]) -> None:
    for length in (5, 16, 61):
        prompt = prompt_of(length, seed=1000 + length)
        alone, = engines["both"].generate(prompt, **params)
        apart = hand_over(engines, add(prompt, **params), prompt)
        assert_same(apart, alone)
    for role in ("prefill", "decode"):
        engines[role].wait_until_nothing_is_held()


@pytest.mark.parametrize("params", [
    {}, {"do_sample": True, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "input_penalty": True},
    {"max_new_tokens": 1}, {"stop_sequences": ((300, 301),), "allowed_token_ids": (300, 301), "do_sample": True, "seed": 1},
], ids=lambda params: " ".join(params) or "greedy")
def test_engines_that_overlap_steps_give_the_same_answers(engines: dict[str, EngineProcess], overlapped_engines: dict[str, EngineProcess],
                                                          params: dict[str, Any]) -> None:
    prompts = [prompt_of(length, seed=2000 + length) for length in (5, 16, 61)]
    expected = engines["both"].generate(*prompts, **params)
    together = overlapped_engines["both"].generate(*prompts, **params)
    apart = [hand_over(overlapped_engines, add(prompt, **params), prompt) for prompt in prompts]
    for ours in (together, apart):
        for answer, reference in zip(ours, expected, strict=True):
            assert_same(answer, reference)
    for engine in overlapped_engines.values():
        engine.wait_until_nothing_is_held()


def test_cancelled_while_steps_overlap_all_is_freed(overlapped_engines: dict[str, EngineProcess]) -> None:
    engine = overlapped_engines["both"]
    jobs = [add(prompt_of(100, seed=400 + i), max_new_tokens=600) for i in range(5)]
    engine.send(*jobs)
    engine.wait_for_tokens(jobs[0].job_id, 3)
    engine.send(*(Cancel(job_id=job.job_id) for job in jobs))
    engine.wait_until_nothing_is_held()


def test_a_second_hand_over_of_a_prefix_is_answered_from_the_own_cache(engines: dict[str, EngineProcess], oracle: LlamaForCausalLM) -> None:
    prompt = prompt_of(40, seed=5)
    for tail in ([11], [12], [11]):
        assert_same(hand_over(engines, add(prompt + tail), prompt + tail), greedy(oracle, prompt + tail))


def test_an_import_from_a_pool_that_is_gone_fails_by_itself(engines: dict[str, EngineProcess]) -> None:
    decode, ready = engines["decode"], engines["prefill"].ready
    job = add(prompt_of(9, seed=6))
    values = {"job_id": job.job_id, "token_ids": job.token_ids, "num_prompt": 8, "params": job.params, "num_kv_tokens": 8, "page_ids": (0,),
              "source": ready.pool, "layout": ready.layout}
    decode.send(ImportSequence(**{**values, "source": type(ready.pool)(ranks=(KVRank(address="/proc/1/fd/999999"),), num_pages=NUM_PAGES)}))
    assert not decode.wait_for(Imported, job.job_id).ok
    other = type(ready.layout)(model="tiny", weights="other", kind="gqa", num_layers=2, row=64, dtype="float32", page_size=PAGE_SIZE)
    decode.send(ImportSequence(**{**values, "layout": other}))
    refused = decode.wait_for(Imported, job.job_id)
    assert not refused.ok and "weights" in refused.error
    decode.send(ImportSequence(**{**values, "page_ids": ()}))
    assert decode.wait_for(Failed, job.job_id).field == "page_ids"
    decode.wait_until_nothing_is_held()


# ---- cancel ----


def test_a_worker_that_may_be_ordered_to_prefill_has_a_way_to_its_pool_for_other_hosts(engines: dict[str, EngineProcess]) -> None:
    assert all(rank.desk for engine in engines.values() for rank in engine.ready.pool.ranks)


def test_cancel_frees_everything_while_waiting_prefilling_and_decoding(both: EngineProcess) -> None:
    unheard = [add(prompt_of(200, seed=200 + i), max_new_tokens=100) for i in range(10)]
    both.send(*unheard, *(Cancel(job_id=job.job_id) for job in unheard))
    started = [add(prompt_of(100, seed=300 + i), max_new_tokens=600) for i in range(5)]
    both.send(*started)
    both.wait_for_tokens(started[0].job_id, 1)  # the first decodes while the others are at all earlier stages
    both.send(*(Cancel(job_id=job.job_id) for job in started), Cancel(job_id="never heard of"))
    both.wait_until_nothing_is_held()
    assert not any(both.answers[job.job_id].finish for job in started if job.job_id in both.answers)


def test_cancel_frees_pins_and_imports(engines: dict[str, EngineProcess]) -> None:
    prefill, decode = engines["prefill"], engines["decode"]
    prompt = prompt_of(100, seed=7)
    job = add(prompt)
    prefill.send(job)
    pinned: Pinned = prefill.wait_for(Pinned, job.job_id)
    ready = prefill.ready
    token_ids = pack_ids(prompt + prefill.answers[job.job_id].token_ids)
    order = ImportSequence(job_id=job.job_id, token_ids=token_ids, num_prompt=100, params=job.params, num_kv_tokens=100, source=ready.pool,
                           page_ids=pinned.page_ids, layout=ready.layout)
    decode.send(order, Cancel(job_id=job.job_id))                      # perhaps in mid-copy
    decode.send(order)
    while not decode.wait_for(Imported, job.job_id).ok:
        pass
    decode.send(Cancel(job_id=job.job_id), Activate(job_id=job.job_id))  # copied, not yet confirmed; then too late
    decode.wait_until_nothing_is_held()
    prefill.send(Cancel(job_id=job.job_id))
    prefill.wait_until_nothing_is_held()


# ---- bad orders, beginnings and ends ----


def test_what_can_never_run_fails_naming_the_field_and_the_engine_goes_on(both: EngineProcess) -> None:
    for job, field_name, text in (
            (add([5, VOCAB_SIZE]), "prompt_ids", f"token id {VOCAB_SIZE}"),
            (add([5], allowed_token_ids=(VOCAB_SIZE,)), "allowed_token_ids", "vocabulary"),
            (add([5] * 3000), "prompt_ids", "no room"),
            (add([5] * 10, max_new_tokens=2040), "max_new_tokens", "2048"),
            (add([5] * 10, max_new_tokens=2000), "max_new_tokens", f"the pool has {NUM_PAGES}"),
            (add([5, 6], num_prompt=1, max_new_tokens=1), "max_new_tokens", "there already")):
        both.send(job)
        failed: Failed = both.wait_for(Failed, job.job_id)
        assert failed.field == field_name and text in failed.error
    assert len(both.generate([5])[0].token_ids) == 12


def test_progress_comes_before_ready_and_shutdown_ends_with_status_0(model_dir: Path) -> None:
    engine = EngineProcess(model_dir, "both")
    events = [engine.wait_for((Progress, Ready))]  # type: ignore[arg-type]
    while not isinstance(events[-1], Ready):
        events.append(engine.wait_for((Progress, Ready)))  # type: ignore[arg-type]
    assert isinstance(events[0], Progress) and events[-2].loaded_bytes == events[-2].total_bytes > 0
    assert (events[-1].vocab_size, events[-1].max_seq_len, events[-1].max_total_tokens) == (VOCAB_SIZE, 2048, NUM_PAGES * PAGE_SIZE)
    assert engine.stop() == 0


@pytest.mark.parametrize("moment", ["loading", "working"])
def test_the_engine_ends_when_the_other_process_does(model_dir: Path, moment: str) -> None:
    engine = EngineProcess(model_dir, "both")
    if moment == "working":
        engine.wait_for(Ready)
        jobs = [add(prompt_of(100, seed=i), max_new_tokens=800) for i in range(8)]
        engine.send(*jobs)
        engine.wait_for_tokens(jobs[0].job_id, 1)
    engine.channel.close()
    assert engine.process.wait(timeout=60) == 0


@pytest.mark.parametrize(("given", "said"), [({"colour": "red"}, "unknown keys ['colour']"),
                                             ({"device": "cpu", "use_fa3": True}, "--enable_fa3: Flash Attention 3 needs a Hopper GPU")])
def test_wrong_settings_end_the_start_with_their_name(model_dir: Path, given: dict[str, Any], said: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, start(theirs, {"model_dir": str(model_dir), "model_name": "tiny", "role": "both", **given},
                             stderr=subprocess.PIPE, text=True) as process:
        _, log = process.communicate(timeout=120)
    assert process.returncode == 2 and said in log


async def test_an_engine_that_hangs_is_noticed_and_a_busy_one_is_not(model_dir: Path) -> None:
    settings = EngineSettings(model_dir=str(model_dir), model_name="tiny", role="both", num_threads=1, max_total_token_num=4096)
    link = await EngineLink.start(settings)

    async def read() -> None:
        async for event in link.events():
            if isinstance(event, Ready):
                is_ready.set()

    is_ready = asyncio.Event()
    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(is_ready.wait(), 60)
        watching = asyncio.create_task(link.silence(1.5))
        link.send(add(prompt_of(1000, seed=1), max_new_tokens=1000))
        await asyncio.sleep(2.5)
        assert not watching.done(), "it answers between steps, and when it has nothing to do"
        link.process.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(watching, 10)
    finally:
        link.process.kill()
        await link.stop()
        await reading
