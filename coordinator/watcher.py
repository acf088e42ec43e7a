"""Give a dead worker's jobs to the living as soon as its lease has lapsed. Any process may run it; one at a time leads.

What it does is idempotent and harmless when done twice: a nak redelivers the message, and a claim decides who owns the job.
Without it, `ack_wait` brings the jobs back, later.
"""

import asyncio
import logging
import time

from coordinator.bus import Bus
from coordinator.errors import TokenmillError
from coordinator.lane_watch import LaneWatch
from coordinator.prefix_index import PrefixIndex
from coordinator.store import Store, WorkerView, owner_name
from coordinator.subjects import OUT_MAX_AGE_S
from coordinator.tasks import end

log = logging.getLogger(__name__)

PERIOD_S = 0.5
LEADER_S = 3.0
SWEEP_PERIOD_S = 60.0
LANES_PERIOD_S = 2.0


class Watcher:
    """Looks twice a second while it leads."""

    def __init__(self, bus: Bus, store: Store, name: str) -> None:
        self._bus = bus
        self._store = store
        self._name = name
        self._next_sweep = 0.0
        self._lanes = LaneWatch(bus)
        self._next_lanes = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch_forever(), name="watcher")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    async def _watch_forever(self) -> None:
        while True:
            try:
                if await self._store.lead("watcher", self._name, LEADER_S):
                    await self.look()
                    await self._look_at_lanes()
                    await self._sweep()
            except TokenmillError as error:
                log.warning("watcher: %s", error)
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> int:
        """Nak the jobs of every lapsed owner, then forget it. Returns how many messages went back."""
        num_naks = 0
        for view in await self._store.workers():
            if not view.is_alive:
                num_naks += await self._bury(view)
        return num_naks

    async def _look_at_lanes(self) -> None:
        now = time.monotonic()
        if now >= self._next_lanes:
            self._next_lanes = now + LANES_PERIOD_S
            await self._lanes.look(await self._store.workers())

    async def _sweep(self) -> None:
        now = time.monotonic()
        if now < self._next_sweep:
            return
        self._next_sweep = now + SWEEP_PERIOD_S
        for job_id in await self._store.stale_admissions(OUT_MAX_AGE_S):
            await self._store.discharge(job_id)
        for model in {str(view.info.get("model", "")) for view in await self._store.workers()}:
            await PrefixIndex(self._store, model).sweep()

    async def _bury(self, view: WorkerView) -> int:
        owner = owner_name(view.worker, view.incarnation)
        orphans = await self._store.orphans(owner)
        for job_id, ack in orphans:
            if await self._bus.get_result(job_id) is not None:
                await self._store.finish(owner, job_id)   # the owner died between its commit and its clean-up
                await self._bus.ack(ack)
            else:
                await self._bus.nak(ack)
        if await self._store.bury(owner):
            log.warning("worker %s: lease lapsed, %d jobs given back to the queue", owner, len(orphans))
        return len(orphans)
