"""The farm's figures: how each is taken, and the bar it is held against. Every prompt is used once, so no prefix cache helps."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from bench.closed_loop import Outcome, judge, run_closed_loop
from bench.engine_peer import EnginePeer
from bench.http_stream import StreamClient, Target
from bench.report import Row
from bench.streams import APIS, Stream
from bench.summary import percentile
from bench.transformers_peer import TransformersPeer
from bench.workload import WorkItem, id_range

LIGHTLLM = APIS["lightllm"]
SHORT_PROMPT, LONG_PROMPT, TINY_PROMPT = 64, 512, 16  # tokens
NUM_TOKENS = 128
NUM_CLIENTS = 16
REQUESTS_PER_CLIENT = 2
IDLE_S = 0.02  # between two requests of the queue path's figure: the farm has put everything away by then

BAR_SINGLE_STREAM, BAR_MANY_CLIENTS, BAR_FIRST_TOKEN_MS, BAR_QUEUE_P50_MS, BAR_QUEUE_P99_MS = 1.1, 5.5, 20.0, 3.0, 15.0
VLLM_NOTE = "vLLM 0.32's CPU build, bf16, measured on another 2-core machine"
VLLM_SINGLE_STREAM, VLLM_MANY_CLIENTS, VLLM_TPOT_MS, VLLM_FIRST_TOKEN_MS = 28.0, 147.0, 88.0, 1500.0

Step = Callable[[], None]


class InvalidAnswer(Exception):
    """The farm's answer is not what was asked for: its time would be no figure."""


class Prompts:
    """Random prompts, none of them twice."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        self._range = id_range(vocab_size)

    def item(self, prompt_len: int, output_len: int) -> WorkItem:
        low, high = self._range
        return WorkItem(tuple(self._draw.randint(low, high) for _ in range(prompt_len)), output_len)


def ask(target: Target, items: Sequence[WorkItem], num_clients: int) -> tuple[float, list[tuple[Outcome, Stream]]]:
    """Wall time of all requests, and their valid answers. Raises InvalidAnswer if one is not valid."""
    run = asyncio.run(run_closed_loop(target, LIGHTLLM, items, num_clients=num_clients))
    answers = []
    for outcome in run.outcomes:
        if outcome.stream is None:
            raise InvalidAnswer(f"status {outcome.status}: {outcome.detail}")
        answers.append((outcome, outcome.stream))
    return run.elapsed_s, answers


def single_stream(target: Target, peer: TransformersPeer, prompts: Prompts, rounds: int, step: Step) -> list[Row]:
    """Farm and transformers in turn on the same prompt, each first in every other round; the figure is the median of the rounds' ratios."""
    farm_rates, peer_rates, num_equal = [], [], 0
    for number in range(rounds + 1):
        item = prompts.item(SHORT_PROMPT, NUM_TOKENS)
        farm_first = number % 2 == 0
        if not farm_first:
            peer_s, peer_ids = peer.generate(item.prompt_ids, NUM_TOKENS)
        _, [(outcome, stream)] = ask(target, [item], 1)
        if farm_first:
            peer_s, peer_ids = peer.generate(item.prompt_ids, NUM_TOKENS)
        step()
        if number == 0:
            continue  # warms both up
        farm_rates.append(NUM_TOKENS / outcome.request_s)
        peer_rates.append(NUM_TOKENS / peer_s)
        num_equal += stream.token_ids == peer_ids
    ratios = [farm / peer for farm, peer in zip(farm_rates, peer_rates, strict=True)]
    farm_rate, peer_rate = median(farm_rates), median(peer_rates)
    note = f"farm {farm_rate:.1f} tok/s, transformers {peer_rate:.1f} tok/s; greedy tokens equal in {num_equal} of {rounds} rounds"
    samples = {"farm_tok_s": farm_rates, "transformers_tok_s": peer_rates}
    return [
        Row(name="single stream vs transformers.generate", figure=median(ratios), bar=BAR_SINGLE_STREAM, unit="×", higher_is_better=True,
            note=note, samples=samples),
        Row(name="single stream vs vLLM", figure=farm_rate, bar=VLLM_SINGLE_STREAM, unit="tok/s", higher_is_better=True,
            note=VLLM_NOTE),
    ]  # fmt: skip


def many_clients(target: Target, prompts: Prompts, rounds: int, step: Step) -> list[Row]:
    """16 clients at once and one client alone, in turn; total output tokens per second of wall time, prompts included."""
    single_rates, many_rates, tpots = [], [], []
    for number in range(rounds + 1):
        alone_s, _ = ask(target, [prompts.item(SHORT_PROMPT, NUM_TOKENS)], 1)
        num_requests = NUM_CLIENTS * (REQUESTS_PER_CLIENT if number else 1)
        together_s, answers = ask(target, [prompts.item(SHORT_PROMPT, NUM_TOKENS) for _ in range(num_requests)], NUM_CLIENTS)
        step()
        if number == 0:
            continue
        single_rates.append(NUM_TOKENS / alone_s)
        many_rates.append(num_requests * NUM_TOKENS / together_s)
        tpots += [outcome.decode_token_s for outcome, _ in answers if outcome.decode_token_s is not None]
    ratio = median(many / single for many, single in zip(many_rates, single_rates, strict=True))
    tpot_ms, rate = median(tpots) * 1000, median(many_rates)
    note = f"{rate:.1f} tok/s in all, one alone {median(single_rates):.1f}; TPOT p50 {tpot_ms:.1f} ms"
    samples = {"single_tok_s": single_rates, "many_tok_s": many_rates, "tpot_p50_ms": tpot_ms, "tpot_p99_ms": percentile(tpots, 99) * 1000}
    return [
        Row(name=f"{NUM_CLIENTS} clients vs single stream", figure=ratio, bar=BAR_MANY_CLIENTS, unit="×", higher_is_better=True,
            note=note, samples=samples),
        Row(name=f"{NUM_CLIENTS} clients vs vLLM", figure=rate, bar=VLLM_MANY_CLIENTS, unit="tok/s", higher_is_better=True,
            note=VLLM_NOTE),
        Row(name=f"{NUM_CLIENTS} clients, TPOT p50 vs vLLM", figure=tpot_ms, bar=VLLM_TPOT_MS, unit="ms", higher_is_better=False,
            note=VLLM_NOTE),
    ]  # fmt: skip


def first_token(target: Target, peer: TransformersPeer, prompts: Prompts, rounds: int, step: Step) -> list[Row]:
    """Time to first token of a long prompt, and transformers' bare forward pass over the same prompt, in turn."""
    farm_ms, peer_ms = [], []
    for number in range(rounds + 1):
        item = prompts.item(LONG_PROMPT, 1)
        farm_first = number % 2 == 0
        if not farm_first:
            peer_s = peer.prefill(item.prompt_ids)
        _, [(outcome, _)] = ask(target, [item], 1)
        if farm_first:
            peer_s = peer.prefill(item.prompt_ids)
        step()
        if number == 0:
            continue
        farm_ms.append(outcome.first_token_s * 1000)
        peer_ms.append(peer_s * 1000)
    farm, peer_p50 = median(farm_ms), median(peer_ms)
    bar = round(peer_p50 + BAR_FIRST_TOKEN_MS, 1)
    note = f"bar: transformers' forward pass {peer_p50:.0f} ms + {BAR_FIRST_TOKEN_MS:g} ms"
    samples = {"farm_ms": farm_ms, "transformers_ms": peer_ms}
    name = f"first token of a {LONG_PROMPT}-token prompt"
    return [
        Row(name=name, figure=farm, bar=bar, unit="ms", higher_is_better=False, note=note, samples=samples),
        Row(name=f"{name} vs vLLM", figure=farm, bar=VLLM_FIRST_TOKEN_MS, unit="ms", higher_is_better=False, note=VLLM_NOTE),
    ]


async def queue_path(target: Target, engine: EnginePeer, prompts: Prompts, num_requests: int, step: Step) -> list[Row]:
    """What the queue adds to the first token of an idle farm: checks, publish, pull, claim, frames.

    In turn: one request through the farm, one to an engine of its own over the bare channel, one plain HTTP request. p50 is the farm's
    median less those of the other two, which a server without a queue has as well. p99 is the farm's p99 less the same medians: the
    spread of engine and HTTP is not taken off, so the figure is on the safe side.
    """
    farm_ms, engine_ms, http_ms = [], [], []
    connection, plain = StreamClient(target), StreamClient(replace(target, path="/liveness"))
    try:
        for number in range(num_requests + num_requests // 10):
            item = prompts.item(TINY_PROMPT, 1)
            outcome = await _ask_once(connection, item)
            await asyncio.sleep(IDLE_S)
            engine_s = await engine.first_token_s(prompts.item(TINY_PROMPT, 1).prompt_ids)
            await asyncio.sleep(IDLE_S)
            answer = await plain.request(None)
            step()
            if number < num_requests // 10:
                continue
            farm_ms.append(outcome.first_token_s * 1000)
            engine_ms.append(engine_s * 1000)
            http_ms.append((answer.pieces[-1][0] - answer.sent_at) * 1000)
    finally:
        connection.close()
        plain.close()
    engine_p50 = median(engine_ms)
    http_p50 = median(http_ms)  # any server's: not the queue's
    p50, p99 = median(farm_ms) - engine_p50 - http_p50, percentile(farm_ms, 99) - engine_p50 - http_p50
    note = (f"{num_requests} requests over REST, one at a time with pauses: p50 {median(farm_ms):.2f} ms, less a bare engine's "
            f"{engine_p50:.2f} ms and a bare HTTP round trip's {http_p50:.2f} ms")
    samples = {"farm_ms": farm_ms, "engine_ms": engine_ms, "http_ms": http_ms}
    return [
        Row(name="queue path, added to first token, p50", figure=p50, bar=BAR_QUEUE_P50_MS, unit="ms", higher_is_better=False,
            note=note, samples=samples),
        Row(name="queue path, added to first token, p99", figure=p99, bar=BAR_QUEUE_P99_MS, unit="ms", higher_is_better=False,
            note=f"farm's p99 {percentile(farm_ms, 99):.2f} ms less the same two medians"),
    ]  # fmt: skip


async def _ask_once(connection: StreamClient, item: WorkItem) -> Outcome:
    outcome = judge(await connection.request(LIGHTLLM.body(item, "")), LIGHTLLM, item)
    if outcome.stream is None:
        raise InvalidAnswer(f"status {outcome.status}: {outcome.detail}")
    return outcome
