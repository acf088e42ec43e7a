"""A mock engine in an EngineLink's place: same methods, no second process."""

import asyncio
import logging
import subprocess
import threading
from collections.abc import AsyncIterator

from coordinator.tokenizer import Tokenizer
from workers.engine_messages import Command, Event, Shutdown
from workers.mock_engine import MockEngine
from workers.settings import EngineSettings

log = logging.getLogger(__name__)

KILLED = -9


class MockLink:
    """Made by `start`. The engine is a task of this process' event loop."""

    def __init__(self, settings: EngineSettings, eos_ids: tuple[int, ...]) -> None:
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._engine = MockEngine(settings, eos_ids, self._events.put_nowait)
        self.process = _NoProcess()
        self._events.put_nowait(self._engine.ready)
        self._task = asyncio.create_task(self._engine.run(), name="mock engine")
        self._task.add_done_callback(self._ended)

    @classmethod
    async def start(cls, settings: EngineSettings) -> "MockLink":
        """Raises ConfigError."""
        log.warning("%s worker runs the MOCK engine: no model, made-up tokens", settings.role)
        tokenizer = await asyncio.to_thread(Tokenizer.from_dir, settings.model_dir)
        return cls(settings, tokenizer.eos_token_ids)

    def send(self, command: Command) -> None:
        self._engine.send(command)

    async def events(self) -> AsyncIterator[Event]:
        while (event := await self._events.get()) is not None:
            yield event

    async def silence(self, limit_s: float) -> None:
        """Never: it lives on the loop that would wait for it."""
        await asyncio.Event().wait()

    async def stop(self, grace_s: float = 0.0) -> int:
        self.send(Shutdown())
        await asyncio.wait([self._task])
        return self.process.wait()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            log.error("the mock engine failed", exc_info=failure)
        self.process.end(0 if failure is None else 1)
        self._events.put_nowait(None)


class _NoProcess:
    """What Worker asks of an engine's process."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._status = 0

    def end(self, status: int) -> None:
        self._status = status
        self._ended.set()

    def poll(self) -> int | None:
        return self._status if self._ended.is_set() else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("mock engine", timeout or 0.0)
        return self._status

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.end(KILLED)
