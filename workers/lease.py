"""Keep this incarnation's lease. Runs in the I/O process, which no forward pass can block."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from coordinator.errors import Unavailable
from coordinator.store import OwnedJob, Store

log = logging.getLogger(__name__)


class Lease:
    """Renews every fifth of the lease time; after Redis was away, asserts what is owned and reports what was lost.

    `is_fresh` is false once the lease may have lapsed by this process' own monotonic clock: then take nothing new.
    """

    def __init__(self, store: Store, owner: str, info: Callable[[], dict[str, Any]], owned: Callable[[], list[OwnedJob]],
                 on_lost: Callable[[set[str]], None]) -> None:
        self._store = store
        self._owner = owner
        self._info = info
        self._owned = owned
        self._on_lost = on_lost
        self._renewed_at = time.monotonic()
        self._run = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self._renewed_at < self._store.lease_s

    def start(self) -> None:
        self._task = asyncio.create_task(self._renew_forever(), name="lease")

    async def _renew_forever(self) -> None:
        while True:
            try:
                await self._renew()
            except Unavailable as error:
                log.warning("lease not renewed: %s", error)
            await asyncio.sleep(self._store.lease_s / 5)

    async def _renew(self) -> None:
        asked_at = time.monotonic()
        is_registered, run = await self._store.renew(self._owner, self._info())
        if not is_registered or run != (self._run or run):
            lost = await self._store.reassert(self._owner, self._info(), self._owned())
            log.warning("Redis came back: asserted again, %d jobs lost to others", len(lost))
            if lost:
                self._on_lost(lost)
        self._run = run
        self._renewed_at = asked_at

    async def renew_now(self) -> None:
        """Publish fresh statistics at once; failing is harmless."""
        try:
            await self._renew()
        except Unavailable as error:
            log.warning("lease not renewed: %s", error)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
