"""With one step running while the next is prepared, every job gets the tokens and events that it gets one step at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import InvalidField
from coordinator.messages import KVLayout, pack_ids
from coordinator.sampling import SamplingParams
from tests.workers.paged_double import EOS, PAGE_SIZE, VOCAB_SIZE, LateExecutor, eager_executor, expected_output, logprob_of
from workers.engine import Engine
from workers.engine_messages import AddSequence, Cancel, Command, Event, Failed, Pinned, ReleasePin, Shutdown, Stats, Tokens
from workers.executor import Executor
from workers.scheduler import Scheduler
from workers.sequence import Limits, Sequence
from workers.step import SchedulerSettings

LAYOUT = KVLayout(model="m", weights="w", kind="gqa", num_layers=1, row=1, dtype="float32", page_size=PAGE_SIZE)
EXECUTORS: list[Callable[[], Executor]] = [lambda: eager_executor(1), lambda: eager_executor(2), LateExecutor]  # type: ignore[list-item]
overlapped = pytest.mark.parametrize("make_executor", EXECUTORS, ids=["depth 1", "depth 2", "depth 2, late"])


class ScriptedInbox:
    """Commands at given turns of the engine's loop, counted by its looks into the inbox; Shutdown when all has been said and done."""

    def __init__(self, script: Iterable[tuple[int, Command]]) -> None:
        self._script = sorted(script, key=lambda entry: entry[0])
        self._turn = 0
        self.cancelled: set[str] = set()

    def empty(self) -> bool:
        if self._script and self._script[0][0] <= self._turn:
            return False
        self._turn += 1
        return True

    def get(self) -> Command:
        if not self._script:
            return Shutdown()
        command = self._script.pop(0)[1]
        if isinstance(command, Cancel):
            self.cancelled.add(command.job_id)
        if isinstance(command, AddSequence):
            self.cancelled.discard(command.job_id)
        return command


@dataclass
class Told:
    """What an engine said about one job."""

    tokens: list[tuple[int, str | None]] = field(default_factory=list)
    num_prefilled: int = 0
    pinned_tokens: list[int] = field(default_factory=list)


class LyingScheduler(Scheduler):
    """Lets sequences in whatever they will need: the pool runs out, and they are preempted."""

    num_preempted = 0

    def add(self, sequence: Sequence) -> None:
        sequence.max_kv_tokens = 1
        super().add(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preempted += 1
        super()._preempt(sequence)


def run(executor: Executor, script: Iterable[tuple[int, Command]], *, lies: bool = False, **given: Any) -> dict[str, Told]:
    """All that the engine says, by job, once nothing is left of it; pages are accounted for."""
    values: dict[str, Any] = {"num_pages": 32, "page_size": PAGE_SIZE, "chunk_size": 4, "max_num_seqs": 4, "eos_ids": frozenset({EOS}),
                              "depth": executor.depth, **given}
    scheduler = (LyingScheduler if lies else Scheduler)(
        SchedulerSettings(max_batch_tokens=values["chunk_size"] + values["max_num_seqs"], **values))
    told: dict[str, Told] = {}
    inbox = ScriptedInbox(script)

    def send(event: Event) -> None:
        match event:
            case Tokens():
                for prefilled in event.prefilled:
                    assert prefilled.job_id not in inbox.cancelled
                    told.setdefault(prefilled.job_id, Told()).num_prefilled += 1
                for row in event.rows:
                    job = told.setdefault(row.job_id, Told())
                    assert row.output_index == len(job.tokens) and job.num_prefilled == 1 and row.job_id not in inbox.cancelled
                    assert row.logprob == logprob_of(row.token_id)
                    job.tokens.append((row.token_id, row.finish))
            case Pinned():
                assert event.job_id not in inbox.cancelled
                told[event.job_id].pinned_tokens.append(event.num_tokens)
            case Stats():
                scheduler.check_integrity()
            case other:
                raise AssertionError(other)

    limits = Limits(vocab_size=VOCAB_SIZE, max_seq_len=60, prefill_only=given.get("role") == "prefill")
    Engine(executor, scheduler, limits, LAYOUT, inbox, send, is_checked=True).run()  # type: ignore[arg-type]
    scheduler.check_integrity()
    assert scheduler.num_live == 0 and scheduler.num_held_pages == 0 and scheduler.pool.num_pins == 0
    if isinstance(scheduler, LyingScheduler):
        run.num_preempted = scheduler.num_preempted  # type: ignore[attr-defined]
    return told


def job(number: int, prompt: list[int], *, is_background: bool = False, **params: Any) -> AddSequence:
    return AddSequence(job_id=f"job{number}", token_ids=pack_ids(prompt), num_prompt=len(prompt), params=SamplingParams(**params),
                       is_background=is_background)


def assert_as_expected(told: dict[str, Told], jobs: Iterable[tuple[AddSequence, list[int]]]) -> None:
    for command, prompt in jobs:
        assert told[command.job_id] == Told(expected_output(prompt, command.params), num_prefilled=1)


# ---- single cases ----


@overlapped
@pytest.mark.parametrize("params", [
    {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 9, "ignore_eos": True}, {"max_new_tokens": 30},
    {"max_new_tokens": 30, "ignore_eos": True, "stop_sequences": tuple((a, b) for a in range(VOCAB_SIZE) for b in range(a))},
], ids=str)
def test_one_sequence_ends_where_it_would_alone(make_executor: Callable[[], Executor], params: dict[str, Any]) -> None:
    for seed in range(12):
        prompt = [seed % VOCAB_SIZE, seed // VOCAB_SIZE, 3, 1, 4]
        command = job(seed, prompt, **params)
        assert_as_expected(run(make_executor(), [(0, command)]), [(command, prompt)])


@overlapped
def test_a_job_id_that_comes_again_starts_anew_without_the_tokens_of_its_former_life(make_executor: Callable[[], Executor]) -> None:
    for turn in range(8):
        first, second = job(1, [1, 2, 3], max_new_tokens=20, ignore_eos=True), job(1, [4, 5], max_new_tokens=9, ignore_eos=True)
        rows: list[tuple[int, int]] = []
        scheduler = Scheduler(SchedulerSettings(num_pages=32, page_size=PAGE_SIZE, chunk_size=4, max_batch_tokens=8, max_num_seqs=4,
                                                depth=make_executor().depth))

        def send(event: Event, rows: list[tuple[int, int]] = rows) -> None:
            if isinstance(event, Tokens):
                rows += [(row.output_index, row.token_id) for row in event.rows]

        inbox = ScriptedInbox([(0, first), (turn, second)])
        Engine(make_executor(), scheduler, Limits(vocab_size=VOCAB_SIZE, max_seq_len=60), LAYOUT, inbox, send).run()  # type: ignore[arg-type]
        expected = [(index, token) for index, (token, _) in enumerate(expected_output([4, 5], second.params))]
        assert rows[-9:] == expected
        assert [index for index, _ in rows] == [*range(len(rows) - 9), *range(9)]


@overlapped
def test_cancelled_in_mid_flight_it_says_nothing_more_and_holds_nothing(make_executor: Callable[[], Executor]) -> None:
    for turn in range(10):
        other, gone = job(1, [1, 2, 3], max_new_tokens=12, ignore_eos=True), job(2, [3, 2, 1, 3, 2, 1], max_new_tokens=20, ignore_eos=True)
        told = run(make_executor(), [(0, other), (0, gone), (turn, Cancel(job_id="job2"))])
        assert_as_expected({"job1": told["job1"]}, [(other, [1, 2, 3])])
        heard = told.get("job2", Told()).tokens
        assert heard == expected_output([3, 2, 1, 3, 2, 1], gone.params)[:len(heard)]


@overlapped
def test_role_prefill_pins_after_the_first_token_and_decodes_nothing(make_executor: Callable[[], Executor]) -> None:
    prompts = [[1, 2, 3], [4] * 9, [0], [1, 2, 3, 4, 5], [5]]
    commands = [job(i, prompt, max_new_tokens=1 if i == 4 else 9, ignore_eos=i != 2) for i, prompt in enumerate(prompts)]
    script = [*((i, command) for i, command in enumerate(commands)), *((99, ReleasePin(job_id=command.job_id)) for command in commands)]
    told = run(make_executor(), script, role="prefill")
    for command, prompt in zip(commands, prompts, strict=True):
        token, finish = expected_output(prompt, command.params)[0]
        assert told[command.job_id] == Told([(token, finish)], 1, [] if finish else [len(prompt)])


@overlapped
def test_a_preempted_sequence_keeps_the_token_that_was_being_drawn(make_executor: Callable[[], Executor]) -> None:
    prompts = [[i, i, i] for i in range(5)]
    commands = [job(i, prompt, max_new_tokens=11, ignore_eos=True) for i, prompt in enumerate(prompts)]
    told = run(make_executor(), [(0, command) for command in commands], lies=True, num_pages=10, max_num_seqs=5, chunk_size=8)
    assert run.num_preempted > 3  # type: ignore[attr-defined]
    assert_as_expected(told, zip(commands, prompts, strict=True))


def test_a_sequence_that_is_about_to_be_pinned_is_not_preempted() -> None:
    scheduler = LyingScheduler(SchedulerSettings(role="prefill", num_pages=4, page_size=PAGE_SIZE, chunk_size=3, max_batch_tokens=7,
                                                 max_num_seqs=4, depth=2))
    for name, length in (("long", 7), ("short", 3)):
        scheduler.add(Sequence(job_id=name, token_ids=[length] * length, num_prompt=length, params=SamplingParams(), max_kv_tokens=length))
    first = scheduler.schedule()
    scheduler.advance(first)
    assert list(first.chunks.values()) == [3, 3] and not scheduler.schedule().chunks, "no page left: the other one starts over"
    events = scheduler.complete(first, [1], [-1.0])
    assert [event.job_id for event in events if isinstance(event, Pinned)] == ["short"]
    scheduler.check_integrity()
    scheduler.release_pin("short")
    assert list(scheduler.schedule().chunks.values()) == [3]


def test_one_sequence_gets_each_token_as_soon_as_its_step_is_done() -> None:
    """The next step is launched before; but nothing waits for that one's result."""
    executor, order = LateExecutor(), []
    launch, run_next = executor.launch, executor.run_next
    executor.launch = lambda *arguments: (order.append("launch"), launch(*arguments))[1]  # type: ignore[method-assign]
    executor.run_next = lambda: (order.append("run"), run_next())[1]  # type: ignore[method-assign]
    run(executor, [(0, job(1, [1, 2], max_new_tokens=4, ignore_eos=True))])
    assert order == ["launch", "launch", "run", "launch", "run", "launch", "run", "run"]


@overlapped
def test_a_row_without_a_number_fails_its_own_sequence_only(make_executor: Callable[[], Executor]) -> None:
    executor = make_executor()
    scheduler = Scheduler(SchedulerSettings(num_pages=32, page_size=PAGE_SIZE, chunk_size=4, max_batch_tokens=8, max_num_seqs=4,
                                            depth=executor.depth))
    for name in "ab":
        scheduler.add(Sequence(job_id=name, token_ids=[1], num_prompt=1, params=SamplingParams(max_new_tokens=9), max_kv_tokens=9))
    steps = []
    for _ in range(executor.depth):
        steps.append(scheduler.schedule())
        scheduler.advance(steps[-1])
    first, *later = [scheduler.complete(step, [0, 5], [float("nan"), -1.0]) for step in steps]
    assert [event.job_id for event in first if isinstance(event, Failed)] == ["a"]
    assert [[row.job_id for row in event.rows] for events in later for event in events if isinstance(event, Tokens)] == [["b"]] * len(later)
    scheduler.check_integrity()


class CountingGuide:
    """Allows everything; must have heard of every token before it is asked again. Ends after `limit` tokens."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    @property
    def is_finished(self) -> bool:
        return self._left == 0

    def take(self, token_id: int) -> None:
        self._left -= 1


@pytest.mark.parametrize("depth", [1, 2])
def test_a_guided_sequence_waits_for_its_token_while_others_go_on(depth: int) -> None:
    executor = eager_executor(depth)
    scheduler = Scheduler(SchedulerSettings(num_pages=32, page_size=PAGE_SIZE, chunk_size=4, max_batch_tokens=8, max_num_seqs=4,
                                            depth=depth))
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    guided, free = (Sequence(job_id=name, token_ids=prompt, num_prompt=2, max_kv_tokens=20, params=params)
                    for name, prompt in (("guided", [1, 2]), ("free", [3, 4])))
    guided.guide = CountingGuide(5)  # type: ignore[assignment]
    scheduler.add(guided)
    scheduler.add(free)
    flights: list[Any] = []
    finished: dict[str, tuple[int, str | None]] = {}
    num_steps = 0
    while scheduler.num_live or flights:
        step = scheduler.schedule()
        assert guided not in step.chunks or not guided.num_in_flight
        if step.chunks:
            num_steps += 1
            flights.append((step, executor.launch(scheduler.batch(step), step.sampled)))
            scheduler.advance(step)
        if len(flights) >= depth or not step.chunks:
            done, flight = flights.pop(0)
            for event in scheduler.complete(done, *flight.result()):
                assert isinstance(event, Tokens)
                finished |= {row.job_id: (row.output_index, row.finish) for row in event.rows if row.finish}
        scheduler.check_integrity()
    assert finished == {"guided": (4, "stop"), "free": (11, "length")}
    assert num_steps == 12, "the other one never waited"


def test_a_guide_that_cannot_go_on_fails_its_own_sequence_by_its_field() -> None:
    class Stuck(CountingGuide):
        def take(self, token_id: int) -> None:
            raise InvalidField("guided_json", "is too ambiguous")

    scheduler = Scheduler(SchedulerSettings(num_pages=32, page_size=PAGE_SIZE, chunk_size=4, max_batch_tokens=8, max_num_seqs=4, depth=2))
    for name in "ab":
        scheduler.add(Sequence(job_id=name, token_ids=[ord(name)], num_prompt=1, params=SamplingParams(max_new_tokens=9), max_kv_tokens=9))
    scheduler._sequences["a"].guide = Stuck(5)  # type: ignore[assignment]
    step = scheduler.schedule()
    scheduler.advance(step)
    tokens, failed = scheduler.complete(step, [0, 5], [-1.0, -1.0])
    assert failed == Failed(job_id="a", error="is too ambiguous", field="guided_json")
    assert isinstance(tokens, Tokens) and [row.job_id for row in tokens.rows] == ["b"]
    scheduler.check_integrity()


# ---- any workload ----

JOBS = st.tuples(
    st.integers(0, 12),                                            # turn in which it comes
    st.lists(st.integers(0, 1), min_size=1, max_size=9),           # prompt: few values, so that prefixes are shared
    st.integers(1, 9),                                             # max_new_tokens
    st.booleans(),                                                 # ignore_eos
    st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=2).map(tuple), max_size=2).map(tuple),  # stop runs
    st.none() | st.integers(0, 25),                                # turn in which it is cancelled
    st.booleans(),                                                 # is_background
)


@settings(max_examples=150, deadline=None)
@given(jobs=st.lists(JOBS, max_size=12), role=st.sampled_from(["both", "prefill"]), lies=st.booleans(), num_pages=st.integers(9, 30),
       chunk_size=st.integers(1, 6), max_num_seqs=st.integers(1, 5), prefix_cache=st.booleans(), background_tokens=st.integers(0, 9))
def test_any_workload_gets_the_same_tokens_and_events_at_every_depth(jobs: list[Any], role: str, lies: bool, num_pages: int,
                                                                    chunk_size: int, max_num_seqs: int, prefix_cache: bool,
                                                                    background_tokens: int) -> None:
    script: list[tuple[int, Command]] = []
    for number, (turn, prompt, new, ignore_eos, runs, cancelled_at, is_background) in enumerate(jobs):
        script.append((turn, job(number, prompt, max_new_tokens=new, ignore_eos=ignore_eos, stop_sequences=runs,
                                 is_background=is_background)))
        if cancelled_at is not None:
            script.append((turn + cancelled_at, Cancel(job_id=f"job{number}")))
        if role == "prefill":
            script += [(1000 + again, ReleasePin(job_id=f"job{number}")) for again in range(len(jobs) * 20)]  # those that waited come later
    for make_executor in EXECUTORS:
        told = run(make_executor(), script, lies=lies, role=role, num_pages=num_pages, chunk_size=chunk_size, max_num_seqs=max_num_seqs,
                   prefix_cache=prefix_cache, background_tokens=background_tokens)
        for number, (_, prompt, new, ignore_eos, runs, cancelled_at, _) in enumerate(jobs):
            params = SamplingParams(max_new_tokens=new, ignore_eos=ignore_eos, stop_sequences=runs)
            expected = expected_output(prompt, params)[:1] if role == "prefill" else expected_output(prompt, params)
            heard = told.get(f"job{number}", Told())
            assert heard.tokens == expected[:len(heard.tokens)]
            if cancelled_at is None:
                is_pinned = role == "prefill" and expected[-1][1] is None
                assert heard == Told(expected, 1, [len(prompt)] if is_pinned else [])
