"""Send tokens to their readers: one compare-and-set chain per producer, one frame in flight, what comes meanwhile joins the next.

A stored frame is what readers see. A refused one (Fenced) means that another worker took over this incarnation's jobs.
"""

import asyncio
import logging
from collections.abc import Callable

from coordinator import subjects
from coordinator.bus import Bus, Chain
from coordinator.errors import Fenced
from coordinator.messages import Frame, TokenRun
from coordinator.tasks import end
from workers.active_job import ActiveJob

log = logging.getLogger(__name__)

MAX_RUNS_PER_FRAME = 2048


class Emitter:
    """Owns this incarnation's chains. `on_stored` is called for each run once it is stored, in order per job."""

    def __init__(self, bus: Bus, worker: str, incarnation: int, *, on_stored: Callable[[ActiveJob, TokenRun], None],
                 on_fenced: Callable[[Fenced], None]) -> None:
        self._bus = bus
        self._worker = worker
        self._incarnation = incarnation
        self._on_stored = on_stored
        self._on_fenced = on_fenced
        self._lanes: dict[str, _Lane] = {}

    def wake(self, active: ActiveJob) -> None:
        """The job has pending tokens: send them as soon as the chain of its producer is free."""
        origin = active.job.origin
        lane = self._lanes.get(origin)
        if lane is None:
            chain = Chain(self._bus, subjects.chain(origin, self._worker, self._incarnation))
            lane = self._lanes[origin] = _Lane(chain, self._on_stored, self._on_fenced)
        lane.wake(active)

    @property
    def num_unsent(self) -> int:
        """Jobs with tokens that are not in a stored frame yet."""
        return sum(lane.num_unsent for lane in self._lanes.values())

    async def flush(self) -> None:
        """Until all that was given is stored, or its chain is fenced."""
        await asyncio.gather(*(lane.idle.wait() for lane in self._lanes.values()))

    async def close(self) -> None:
        """Stop sending at once; what is not stored stays unsaid."""
        await end(lane.task for lane in self._lanes.values())


class _Lane:
    def __init__(self, chain: Chain, on_stored: Callable[[ActiveJob, TokenRun], None], on_fenced: Callable[[Fenced], None]) -> None:
        self._chain = chain
        self._on_stored = on_stored
        self._on_fenced = on_fenced
        self._waiting: dict[str, ActiveJob] = {}
        self._num_in_flight = 0
        self._wake = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.task = asyncio.create_task(self._send_forever(), name=f"emit {chain.subject}")

    @property
    def num_unsent(self) -> int:
        return len(self._waiting) + self._num_in_flight

    def wake(self, active: ActiveJob) -> None:
        self._waiting[active.key] = active
        self.idle.clear()
        self._wake.set()

    async def _send_forever(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._waiting:
                    await self._send_once()
                self.idle.set()
        except Fenced as fenced:
            self._on_fenced(fenced)
        finally:
            self.idle.set()

    async def _send_once(self) -> None:
        batch = [self._waiting.pop(key) for key in list(self._waiting)[:MAX_RUNS_PER_FRAME]]
        sent = [(active, run) for active in batch if (run := active.drain_pending()) is not None]
        if not sent:
            return
        self._num_in_flight = len(sent)
        await self._chain.append(Frame(runs=tuple(run for _, run in sent)).encode())
        self._num_in_flight = 0
        for active, run in sent:
            active.num_stored += len(run.token_ids)
            self._on_stored(active, run)
