"""The I/O process' end of the engine: start it, send commands, receive events, notice its death and its silence."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Protocol

from workers.channel import AsyncChannel
from workers.engine_messages import Command, Event, Ping, Shutdown, decode_event, encode
from workers.settings import EngineSettings

log = logging.getLogger(__name__)

SHUTDOWN_GRACE_S = 5.0
PING_S = 1.0


class EngineCommands(Protocol):
    """What the jobs of a worker need of its engine."""

    def send(self, command: Command) -> None: ...


class EngineLink:
    """A running engine process. The engine exits when this end of the socketpair closes, however this process ends."""

    def __init__(self, process: subprocess.Popen[bytes], channel: AsyncChannel) -> None:
        self.process = process
        self._channel = channel
        self._num_events = 0

    @classmethod
    async def start(cls, settings: EngineSettings) -> "EngineLink":
        ours, theirs = socket.socketpair()
        argv = [sys.executable, "-m", "workers.engine", "--fd", str(theirs.fileno()), "--settings", json.dumps(asdict(settings))]
        process = await asyncio.to_thread(subprocess.Popen, argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=os.environ)
        theirs.close()
        return cls(process, await AsyncChannel.open(ours))

    def send(self, command: Command) -> None:
        """Never blocks; commands keep their order."""
        self._channel.send(encode(command))

    async def events(self) -> AsyncIterator[Event]:
        """Until the engine is gone."""
        async for data in self._channel:
            self._num_events += 1
            yield decode_event(data)

    async def silence(self, limit_s: float) -> None:
        """Returns once a loaded engine has said nothing for `limit_s` although it was asked: its main thread hangs, or is stopped.

        Counted in waits of this process, so that one which was stopped itself does not blame the engine. Needs `events` to be read.
        """
        wait_s, silent_s = min(PING_S, limit_s / 4), 0.0
        while silent_s < limit_s:
            if not silent_s:
                self.send(Ping())
            num_events = self._num_events
            await asyncio.sleep(wait_s)
            silent_s = silent_s + wait_s if num_events == self._num_events else 0.0

    async def stop(self, grace_s: float = SHUTDOWN_GRACE_S) -> int:
        """Ask, wait, insist. Returns the exit status."""
        if self.process.poll() is None:
            self.send(Shutdown())
        try:
            await asyncio.wait_for(asyncio.to_thread(self.process.wait), grace_s)
        except TimeoutError:
            log.warning("engine %d did not stop in %g s: killed", self.process.pid, grace_s)
            self.process.kill()
        await self._channel.close()
        return await asyncio.to_thread(self.process.wait)
