"""One worker of a mock fleet: a mock engine and its successive incarnations, on a loop that it shares with others."""

import asyncio
import logging

from coordinator.bus import Bus
from coordinator.errors import Unavailable
from coordinator.store import Store
from coordinator.tasks import end
from coordinator.tokenizer import Tokenizer
from workers.engine_messages import Event, Stats
from workers.incarnation import Incarnation
from workers.mock_engine import MockEngine
from workers.settings import WorkerSettings

log = logging.getLogger(__name__)

RETRY_S = 1.0


class MockWorker:
    """Registers, pulls, claims, hands over and answers as any worker does. Raises ConfigError for settings that cannot be."""

    def __init__(self, settings: WorkerSettings, tokenizer: Tokenizer, bus: Bus, store: Store) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._bus = bus
        self._store = store
        self._engine = MockEngine(settings.engine, tokenizer.eos_token_ids, self._on_event)
        self._stats = self._engine.scheduler.stats()
        self._life: Incarnation | None = None

    @property
    def is_registered(self) -> bool:
        return self._life is not None

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; then what it has may finish, and the rest goes back into the queue."""
        engine = asyncio.create_task(self._engine.run(), name=f"mock engine of {self._settings.worker_id}")
        try:
            while not stopping.is_set():
                await self._live(stopping)
        finally:
            await end([engine])

    async def _live(self, stopping: asyncio.Event) -> None:
        life = Incarnation(self._settings, self._engine.ready, self._stats, self._engine, self._tokenizer, self._bus, self._store)
        try:
            await life.start()
        except Unavailable as error:
            log.warning("%s: not registered: %s", self._settings.worker_id, error)
            await asyncio.sleep(RETRY_S)
            return
        self._life = life
        endings = [asyncio.create_task(stopping.wait()), asyncio.create_task(life.over.wait())]
        await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
        await end(endings)
        await life.stop_pulling()
        if not life.over.is_set():
            await life.drain(self._settings.drain_timeout_s)
        await life.leave()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Stats):
            self._stats = event
        if self._life is not None:
            self._life.on_event(event)
