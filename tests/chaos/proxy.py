"""A TCP proxy that can be cut: connections reset, or left open while every byte is held back as a dead network would."""

import asyncio
import contextlib
import socket
import struct
from typing import Self

CHUNK_BYTES = 65536


class TcpProxy:
    """Forwards a port of its own to one target. Made by `open`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._flows = asyncio.Event()
        self._flows.set()
        self._refuses = False
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        self = cls(host, port)
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def cut(self, seconds: float, *, reset: bool) -> None:
        """With `reset` every connection is reset and new ones are too; else bytes vanish into a silence, as long as the cut lasts.

        At the end of a silent cut the connections that lived through it are reset: their bytes are lost, no stream could go on.
        """
        self._refuses = reset
        self._flows.clear()
        if reset:
            self._reset_all()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._reset_all()
            self._refuses = False
            self._flows.set()

    async def close(self) -> None:
        self._server.close()
        self._reset_all()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refuses:
            _reset(writer)
            return
        self._writers.add(writer)
        try:
            await self._flows.wait()     # during a silent cut: the handshake is the kernel's, then nothing comes
            there_reader, there_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            self._writers.discard(writer)
            return
        self._writers.add(there_writer)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK_BYTES):
                if self._flows.is_set():
                    sink.write(data)
                    await sink.drain()
        sink.close()
        self._writers.discard(sink)

    def _reset_all(self) -> None:
        for writer in self._writers:
            _reset(writer)
        self._writers.clear()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):   # it may be closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
