"""Count jobs in before they are published, without making every request wait for Redis.

While a class is known to be less than half full, a job that nothing else bounds is counted in beside its publish. Whoever names a job or
a tenant waits for the answer: a name may be known already, a tenant may be at its bound.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from coordinator.errors import TokenmillError
from coordinator.store import AdmissionLimits, Admitted, Store

log = logging.getLogger(__name__)

FRESH_S = 1.0          # how long a class that was less than half full is taken to have room
ROOMY = 0.5
LimitsOf = Callable[[str, AdmissionLimits], AdmissionLimits]
BESIDE_DELAY_S = 0.002   # the publish goes first: its way to the first token is the longer one


class OpenWork:
    """One per producer. `count_in` raises QueueFull, Unavailable. `limits_of` says what holds for a tenant, given the farm's limits."""

    def __init__(self, store: Store, limits: AdmissionLimits, limits_of: LimitsOf | None = None) -> None:
        self._store = store
        self._limits = limits
        self._limits_of: LimitsOf = limits_of or (lambda tenant, farm: farm)
        self._roomy_until: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def count_in(self, job: Admitted) -> bool:
        """False: a job of this id is known already."""
        is_bounded = job.is_named or bool(job.tenant) or self._limits.max_tenant_jobs or self._limits.max_tenant_tokens
        if not is_bounded and time.monotonic() < self._roomy_until.get(job.klass, 0.0):
            self._spawn(self._count_in_beside(job))
            return True
        return await self._ask(job)

    def count_out(self, job_id: str) -> None:
        """A job that was surely not published. Its refusal does not wait for this."""
        self._spawn(self._count_out_beside(job_id, [*self._tasks]))

    async def settle(self) -> None:
        """Wait for what is being counted beside."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, counting: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(counting)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _count_out_beside(self, job_id: str, earlier: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*earlier, return_exceptions=True)  # it may still be on its way in
        try:
            await self._store.discharge(job_id)
        except TokenmillError as error:
            log.warning("job %s stays counted until the watcher finds it: %s", job_id, error)

    async def _ask(self, job: Admitted) -> bool:
        open_tokens = await self._store.admit(job, self._limits_of(job.tenant, self._limits))
        if open_tokens is None:
            return False
        most = self._limits.max_class_tokens
        self._roomy_until[job.klass] = time.monotonic() + FRESH_S if not most or open_tokens < ROOMY * most else 0.0
        return True

    async def _count_in_beside(self, job: Admitted) -> None:
        await asyncio.sleep(BESIDE_DELAY_S)
        try:
            await self._ask(job)
        except TokenmillError as error:
            log.warning("job %s was published uncounted: %s", job.job_id, error)
            self._roomy_until.clear()  # the next one waits for the answer
