"""Whole messages over a socketpair: a 4-byte little-endian length, then that many bytes. What they mean is not known here.

One end blocks (`BlockingChannel`: the engine's threads), the other is for an event loop (`AsyncChannel`). The end of the stream
means that the peer closed or died; a message that it cut short is dropped with it.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from coordinator.errors import MalformedMessage

MAX_FRAME_BYTES = 64 * 1024 * 1024
GREETING_S = 10.0                      # a peer on a port that is open to others too says who it is as soon as it is connected
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024  # a reader that is late by some steps does not hold up the step loop
_READ_BYTES = 256 * 1024
_HEADER = struct.Struct("<I")


class BlockingChannel:
    """One thread receives; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        _prepare(sock)
        sock.setblocking(True)
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Returns when the kernel has it. Raises OSError if the peer is gone."""
        with self._sending:
            self._sock.sendall(_frame(data))

    def __iter__(self) -> Iterator[bytes]:
        """Messages until the peer closes. Raises MalformedMessage on a length that no sender writes."""
        splitter = _Splitter()
        while received := self._receive():
            yield from splitter.feed(received)

    def greeting(self, timeout_s: float) -> tuple[bytes, Iterator[bytes]]:
        """The first message, and an iterator over all others; b"" from a peer that says nothing: it may be a stranger on an open port."""
        messages = iter(self)
        self._sock.settimeout(timeout_s)
        try:
            return next(messages, b""), messages
        except TimeoutError:
            return b"", messages
        finally:
            self._sock.setblocking(True)

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(_READ_BYTES)
        except ConnectionError:
            return b""  # the peer died with bytes of ours unread: the same end

    def close(self) -> None:
        self._sock.close()


class AsyncChannel:
    """For one event loop: `send` buffers and never blocks, iterating yields messages until the peer closes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> "AsyncChannel":
        """Takes the socket over."""
        _prepare(sock)
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_READ_BYTES))

    def send(self, data: bytes) -> None:
        """A message to a peer that is gone is dropped: iterating ends and tells."""
        if not self._writer.is_closing():
            self._writer.write(_frame(data))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        splitter = _Splitter()
        while received := await self._receive():
            for message in splitter.feed(received):
                yield message

    async def _receive(self) -> bytes:
        try:
            return await self._reader.read(_READ_BYTES)
        except ConnectionError:
            return b""

    async def close(self) -> None:
        """Send what is buffered if the peer still reads, then close."""
        self._writer.close()
        with suppress(ConnectionError):  # it was gone already
            await self._writer.wait_closed()


class _Splitter:
    """Stream bytes in, whole messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[bytes]:
        buffer, messages, start = self._buffer, [], 0
        buffer += received
        while len(buffer) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(buffer, start)
            if size > MAX_FRAME_BYTES:
                raise MalformedMessage(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
            if len(buffer) - start - _HEADER.size < size:
                break
            start += _HEADER.size
            messages.append(bytes(buffer[start:start + size]))
            start += size
        del buffer[:start]
        return messages


def _frame(data: bytes) -> bytes:
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over the channel's limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(data)) + data


def _prepare(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
