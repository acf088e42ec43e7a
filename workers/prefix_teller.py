"""Tell the index in Redis which pages this incarnation has in its prefix cache: changes gathered for a moment, all of them after a loss."""

import asyncio
import logging
from collections.abc import Callable

from coordinator.errors import Unavailable
from coordinator.prefix_index import PrefixIndex
from coordinator.tasks import end
from workers.block_journal import split_digests
from workers.engine_messages import Blocks

log = logging.getLogger(__name__)

GATHER_S = 0.1
RETRY_S = 2.0


class PrefixTeller:
    """`want_all` asks the engine for a Blocks event with everything; `on_blocks` is given all of them."""

    def __init__(self, index: PrefixIndex, incarnation: int, want_all: Callable[[], None]) -> None:
        self._index = index
        self._incarnation = incarnation
        self._want_all = want_all
        self._era = ""
        self._added: set[bytes] = set()
        self._evicted: set[bytes] = set()
        self._has_news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._tell_forever(), name="prefix teller")
        self._want_all()

    def on_blocks(self, blocks: Blocks) -> None:
        added, evicted = set(split_digests(blocks.added)), set(split_digests(blocks.evicted))
        if blocks.is_all:
            self._added, self._evicted = added, set()
        else:
            self._added = (self._added - evicted) | added
            self._evicted = (self._evicted - added) | evicted
        self._has_news.set()

    async def _tell_forever(self) -> None:
        while True:
            await self._has_news.wait()
            await asyncio.sleep(GATHER_S)
            self._has_news.clear()
            added, evicted = self._added, self._evicted
            self._added, self._evicted = set(), set()
            try:
                era = await self._index.tell(self._incarnation, self._era, list(added), list(evicted))
            except Unavailable as error:
                log.info("prefix index not told: %s", error)
                self._want_all()   # whether it was noted is not known
                await asyncio.sleep(RETRY_S)
                continue
            if era != self._era:
                self._era = era
                self._want_all()

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])
