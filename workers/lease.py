"""Keep this incarnation's lease. Runs in the I/O process, which no forward pass can block."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from coordinator.errors import Unavailable
from coordinator.store import OwnedJob, Store
from coordinator.tasks import end

log = logging.getLogger(__name__)


class Lease:
    """Renews every fifth of the lease time; after Redis lost data, asserts what is owned.

    owned       what to assert; called once per loss, drops what must not be asserted
    on_lost     told the ids that are somebody else's by now
    on_over     told once when this incarnation must end: others took from it
    `is_fresh` is false once the lease may have lapsed by this process' own monotonic clock: then take nothing new.
    """

    def __init__(self, store: Store, owner: str, info: Callable[[], dict[str, Any]], owned: Callable[[], list[OwnedJob]],
                 on_lost: Callable[[set[str]], None], on_over: Callable[[], None]) -> None:
        self._store = store
        self._owner = owner
        self._info = info
        self._owned = owned
        self._on_lost = on_lost
        self._on_over = on_over
        self._renewed_at = time.monotonic()
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
        state = await self._store.renew(self._owner, self._info())
        if state == "assert":
            lost = await self._store.reassert(self._owner, self._info(), self._owned())
            if lost is None:
                state = "over"
            else:
                log.warning("Redis had lost data: asserted again, %d jobs lost to others", len(lost))
                self._on_lost(lost)
        if state == "over":
            self._on_over()
        else:
            self._renewed_at = asked_at

    async def renew_now(self) -> None:
        """Publish fresh statistics at once; failing is harmless."""
        try:
            await self._renew()
        except Unavailable as error:
            log.warning("lease not renewed: %s", error)

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])
