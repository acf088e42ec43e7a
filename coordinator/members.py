"""Who else belongs to the farm: REST shims and config servers say so every two seconds. (Workers have leases: store.py.)

    {tokenmill}:members         hash   name -> msgpack of what it says of itself (kind, url, model, …)
    {tokenmill}:members_until   hash   name -> when that is over unless it is said again, ms

Nothing is decided by this: it is for status, for `/registry`, and for finding another door. A member that died stands there as silent for
a while.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from coordinator.errors import Unavailable
from coordinator.store import Store
from coordinator.tasks import end

log = logging.getLogger(__name__)

BEAT_S, TTL_S, FORGET_S = 2.0, 6.0, 60.0
KEYS = ["members", "members_until"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberView:
    """One member as it last said."""

    name: str
    is_alive: bool
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.info.get("kind", ""))


class Membership:
    """Says of this process that it is there. `info` is asked at each beat."""

    def __init__(self, store: Store, name: str, info: Callable[[], dict[str, Any]]) -> None:
        self._store, self._name, self._info = store, name, info
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._beat_forever(), name="membership")

    async def close(self) -> None:
        if self._task is None:
            return
        await end([self._task])
        try:
            await self._store.script("member_leave", KEYS, self._name)
        except Unavailable as error:
            log.info("not signed off: %s", error)

    async def _beat_forever(self) -> None:
        while True:
            try:
                await self._store.script("member_beat", KEYS, self._name, msgpack.packb(self._info()), int(TTL_S * 1000))
            except Unavailable as error:
                log.info("membership: %s", error)
            await asyncio.sleep(BEAT_S)


async def members(store: Store) -> list[MemberView]:
    """All, by name; those that fell silent lately too. Raises Unavailable."""
    rows = await store.script("members", KEYS, int(FORGET_S * 1000))
    views = [MemberView(name=_text(name), is_alive=int(left) > 0, info=msgpack.unpackb(info)) for name, left, info in rows]
    return sorted(views, key=lambda view: view.name)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
