"""A farm in virtual time: the real scheduler and prefix cache of each worker, steps as long as the mock engine's, no queue and no network.

What it leaves out is what a real farm adds: pulling, claims, stale views. So it says what a router could reach that knows everything at
once, and how a policy behaves over hours in seconds. One thread, one heap of events, the same result every time.
"""

import heapq
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import count

from coordinator.messages import pack_ids
from coordinator.sampling import SamplingParams
from workers.engine_messages import AddSequence, Event, ImportSequence, TokenRow, Tokens
from workers.mock_costs import MockCosts
from workers.mock_engine import LOGPROB, mock_token
from workers.scheduler import Scheduler
from workers.sequence import Limits, Sequence, State, open_sequence
from workers.step import PageCopy, Role, SchedulerSettings, Step

VOCAB_SIZE = 49_152


@dataclass(slots=True, kw_only=True)
class VirtualJob:
    """One request and what became of it; times are virtual seconds."""

    job_id: str
    prompt: Seq[int]
    num_output: int
    sent_s: float
    worker: int = -1
    cached_tokens: int = 0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    output: list[int] = field(default_factory=list)

    def take(self, row: TokenRow, now_s: float) -> None:
        self.output.append(row.token_id)
        self.first_token_s = self.first_token_s or now_s
        if row.finish is not None:
            self.ended_s = now_s

    @property
    def tpot_s(self) -> float:
        return (self.ended_s - self.first_token_s) / max(1, len(self.output) - 1)


class VirtualClock:
    """Calls in the order of their times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = count()

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (at_s, next(self._serial), call))

    def run(self, until_s: float = float("inf")) -> None:
        while self._heap and self._heap[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self._heap)
            call()


class VirtualEngine:
    """The mock engine in virtual time: commands go in by method, events go to `deliver`."""

    def __init__(self, clock: VirtualClock, costs: MockCosts, settings: SchedulerSettings, deliver: Callable[[Event], None]) -> None:
        self.scheduler = Scheduler(settings)
        self.busy_s = 0.0
        self.step_s = 0.0        # of the newest step that decoded; 0 while nothing runs
        self._clock = clock
        self._costs = costs
        self._deliver = deliver
        self._limits = Limits(vocab_size=VOCAB_SIZE, max_seq_len=1 << 20, prefill_only=settings.role == "prefill")
        self._is_running = False

    def add(self, command: AddSequence | ImportSequence) -> Sequence:
        sequence = open_sequence(command, self._limits)
        self.scheduler.add(sequence)
        self._wake()
        return sequence

    def activate(self, job_id: str) -> None:
        self.scheduler.activate(job_id)
        self._wake()

    def release_pin(self, job_id: str) -> None:
        self.scheduler.release_pin(job_id)
        self._wake()

    def _wake(self) -> None:
        if not self._is_running:
            self._is_running = True
            self._clock.call_at(self._clock.now_s, self._step)

    def _step(self) -> None:
        step = self.scheduler.schedule()
        for copy in step.copies:
            at_s = self._clock.now_s + self._costs.copy_s(len(copy.src_pages))
            self._clock.call_at(at_s, lambda copy=copy: self._finish_copy(copy))  # type: ignore[misc]
        self._is_running = bool(step.chunks)
        for event in step.imported:
            self._deliver(event)
        if not step.chunks:
            self.step_s = 0.0
            return
        num_decodes = sum(sequence.num_pending == 1 for sequence in step.chunks)
        duration_s = self._costs.step_s(step.num_tokens - num_decodes, num_decodes)
        self.busy_s += duration_s
        self.step_s = duration_s if num_decodes else self.step_s
        self.scheduler.advance(step)
        self._clock.call_at(self._clock.now_s + duration_s, lambda: self._complete(step))

    def _complete(self, step: Step) -> None:
        token_ids = [mock_token(sequence, VOCAB_SIZE) for sequence in step.sampled]
        for event in self.scheduler.complete(step, token_ids, [LOGPROB] * len(token_ids)):
            self._deliver(event)
        self._step()

    def _finish_copy(self, copy: PageCopy) -> None:
        event = self.scheduler.finish_copy(copy)
        if event is not None:
            self._deliver(event)
        self._wake()


class VirtualWorker:
    """One of role both. `on_ended` is told of each job when its last token is there."""

    def __init__(self, index: int, clock: VirtualClock, costs: MockCosts, settings: SchedulerSettings,
                 on_ended: Callable[[VirtualJob], None]) -> None:
        self.index = index
        self._clock = clock
        self._engine = VirtualEngine(clock, costs, settings, self._on_event)
        self._on_ended = on_ended
        self.num_added = 0
        self._standing = 0
        self._jobs: dict[str, tuple[VirtualJob, Sequence]] = {}

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    @property
    def backlog(self) -> int:
        """Prompt tokens still to compute."""
        return sum(sequence.num_pending for _, sequence in self._jobs.values()
                   if sequence.num_pending > 1 or sequence.state is State.WAITING)

    def take_standing(self) -> int:
        """The least backlog since the last call."""
        standing, self._standing = self._standing, self.backlog
        return standing

    def cached_tokens(self, prompt: Seq[int]) -> int:
        cache = self._engine.scheduler.cache
        path = cache.match(prompt, len(prompt) - 1)
        num_tokens = len(path) * cache.page_size
        cache.unlock(path)
        return num_tokens

    def add(self, job: VirtualJob) -> None:
        job.worker = self.index
        self.num_added += 1
        self._jobs[job.job_id] = (job, self._engine.add(add_command(job)))

    def _on_event(self, event: Event) -> None:
        self._standing = min(self._standing, self.backlog)
        if not isinstance(event, Tokens):
            return
        for told in event.prefilled:
            self._jobs[told.job_id][0].cached_tokens = told.cached_tokens
        for row in event.rows:
            job = self._jobs[row.job_id][0]
            job.take(row, self._clock.now_s)
            if row.finish is not None:
                del self._jobs[row.job_id]
                self._on_ended(job)


def add_command(job: VirtualJob) -> AddSequence:
    return AddSequence(job_id=job.job_id, token_ids=pack_ids(job.prompt), num_prompt=len(job.prompt),
                       params=SamplingParams(max_new_tokens=job.num_output, ignore_eos=True))


def scheduler_settings(*, role: Role = "both", num_tokens: int, page_size: int = 16, chunk_size: int = 2048,
                       max_num_seqs: int = 64) -> SchedulerSettings:
    """As a mock engine with these settings has them."""
    return SchedulerSettings(role=role, num_pages=num_tokens // page_size, page_size=page_size, chunk_size=chunk_size,
                             max_num_seqs=max_num_seqs, max_batch_tokens=chunk_size + max_num_seqs)
