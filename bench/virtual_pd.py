"""A farm with prefill and decode apart, in virtual time: jobs and handles are pulled by room, roles change behind a drain.

Schedulers, pins, imports and hand-over of pages are the workers' own; queues are lists here, and nothing crashes.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.virtual_farm import VirtualClock, VirtualEngine, VirtualJob, add_command, scheduler_settings
from coordinator.messages import KVLayout, KVRank, pack_ids
from coordinator.sampling import SamplingParams
from workers.engine_messages import Event, Imported, ImportSequence, Pinned, PoolAddress, Tokens
from workers.mock_costs import MockCosts
from workers.step import SchedulerSettings

MAX_IMPORTS = 8
SWITCH_S = 1.0        # from the end of the drain to the first pull in the new role


@dataclass(frozen=True, slots=True)
class Handle:
    job: VirtualJob
    source: "PdWorker"
    pinned: Pinned
    at_s: float


class PdWorker:
    """One worker of role prefill or decode."""

    def __init__(self, name: str, role: str, farm: "PdFarm") -> None:
        self.name = name
        self.role = role
        self.is_draining = False
        self.jobs: dict[str, VirtualJob] = {}
        self.imports: dict[str, Handle] = {}
        self._next_role = ""
        self._farm = farm
        self._engine = self._new_engine()

    @property
    def scheduler_stats(self) -> tuple[int, int, int]:
        """(sequences running, free tokens, all tokens)"""
        stats = self._engine.scheduler.stats()
        return stats.running, stats.free_tokens, stats.total_pages * self._farm.page_size

    @property
    def step_s(self) -> float:
        return self._engine.step_s if self.role == "decode" else 0.0

    @property
    def has_room(self) -> bool:
        stats = self._engine.scheduler.stats()
        if self.is_draining or stats.free_tokens <= 0 or len(self.jobs) >= self._farm.max_num_seqs:
            return False
        if self.role == "decode":
            return len(self.imports) < MAX_IMPORTS
        return stats.pending_tokens < 2 * self._farm.chunk_size

    def start(self, job: VirtualJob) -> None:
        self.jobs[job.job_id] = job
        self._engine.add(add_command(job))

    def take(self, handle: Handle) -> None:
        job, pinned = handle.job, handle.pinned
        self.jobs[job.job_id] = job
        self.imports[job.job_id] = handle
        self._engine.add(ImportSequence(
            job_id=job.job_id, token_ids=pack_ids([*job.prompt, *job.output]), num_prompt=len(job.prompt),
            params=SamplingParams(max_new_tokens=job.num_output, ignore_eos=True), num_kv_tokens=pinned.num_tokens,
            page_ids=pinned.page_ids,
            source=PoolAddress(ranks=(KVRank(address=""),), num_pages=1 << 30), layout=self._farm.layout))

    def release(self, job_id: str) -> None:
        del self.jobs[job_id]
        self._engine.release_pin(job_id)
        self._when_drained()
        self._farm.look()

    def switch(self, role: str) -> None:
        """Take nothing more; what is here ends, then the other role begins."""
        self.is_draining, self._next_role = True, role
        self._when_drained()

    def _when_drained(self) -> None:
        if self._next_role and not self.jobs:
            self._next_role, role = "", self._next_role
            self._farm.clock.call_at(self._farm.clock.now_s + SWITCH_S, lambda: self._begin(role))

    def _begin(self, role: str) -> None:
        self.role, self.is_draining = role, False
        self._engine = self._new_engine()
        self._farm.look()

    def _new_engine(self) -> VirtualEngine:
        return VirtualEngine(self._farm.clock, self._farm.costs, self._farm.settings(self.role), self._on_event)

    def _on_event(self, event: Event) -> None:
        farm, now_s = self._farm, self._farm.clock.now_s
        match event:
            case Tokens():
                for row in event.rows:
                    job = self.jobs[row.job_id]
                    job.take(row, now_s)
                    if row.finish is not None:
                        del self.jobs[row.job_id]
                        farm.ended(job)
            case Pinned():
                farm.handles.append(Handle(self.jobs[event.job_id], self, event, now_s))
            case Imported():
                self.imports.pop(event.job_id).source.release(event.job_id)
                self._engine.activate(event.job_id)
        self._when_drained()
        farm.look()


class PdFarm:
    """`send` jobs; `on_ended` is told of each."""

    def __init__(self, clock: VirtualClock, costs: MockCosts, roles: dict[str, str], on_ended: Callable[[VirtualJob], None], *,
                 num_tokens: int = 65_536, page_size: int = 64, chunk_size: int = 2048, max_num_seqs: int = 64) -> None:
        self.clock, self.costs = clock, costs
        self.page_size, self.chunk_size, self.max_num_seqs = page_size, chunk_size, max_num_seqs
        self.layout = KVLayout(model="virtual", weights="", kind="mock", num_layers=1, row=1, dtype="none", page_size=page_size)
        self.waiting: deque[VirtualJob] = deque()
        self.handles: deque[Handle] = deque()
        self._settings = scheduler_settings(num_tokens=num_tokens, page_size=page_size, chunk_size=chunk_size, max_num_seqs=max_num_seqs)
        self._on_ended = on_ended
        self.workers = [PdWorker(name, role, self) for name, role in roles.items()]

    def settings(self, role: str) -> SchedulerSettings:
        return replace(self._settings, role=role)  # type: ignore[arg-type]

    def send(self, job: VirtualJob) -> None:
        self.waiting.append(job)
        self.look()

    def ended(self, job: VirtualJob) -> None:
        self._on_ended(job)

    def look(self) -> None:
        """Whoever has most room pulls next, as among workers with open pulls."""
        for role, queue in (("prefill", self.waiting), ("decode", self.handles)):
            while queue:
                takers = [worker for worker in self.workers if worker.role == role and worker.has_room]
                if not takers:
                    break
                taker = min(takers, key=lambda worker: len(worker.jobs))
                if role == "prefill":
                    taker.start(self.waiting.popleft())
                else:
                    taker.take(self.handles.popleft())
