"""A small HTTP/1.1 client that stamps every piece of an answer when it arrives.

The load client shares the machine with the servers that it measures: this costs about 10 us per token, a general client ten times that.
"""

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from urllib.parse import urlsplit

import httptools


@dataclass(slots=True)
class Response:
    """One answer. Times are of `time.perf_counter`."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # (arrival, bytes of the body)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def data_lines(self) -> list[tuple[float, bytes]]:
        """The payload of each complete `data:` line of a server-sent event stream, with the arrival of its end."""
        lines: list[tuple[float, bytes]] = []
        rest = b""
        for arrival, piece in self.pieces:
            *complete, rest = (rest + piece).split(b"\n")
            lines += [(arrival, line[5:].strip()) for line in complete if line.startswith(b"data:")]
        return lines


@dataclass(frozen=True, slots=True)
class Target:
    """Where to POST. `Target.parse` takes a URL."""

    host: str
    port: int
    path: str
    is_tls: bool

    @classmethod
    def parse(cls, url: str) -> "Target":
        """Raises ValueError for what is not an http(s) URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http URL: {url}")
        is_tls = parts.scheme == "https"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), path, is_tls)


class StreamClient:
    """One keep-alive connection, one request at a time; connects anew when the server closed it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: _Connection | None = None

    async def request(self, body: bytes | None) -> Response:
        """POST `body` (None: GET) and read the whole answer. Raises OSError when the connection fails or ends too early."""
        connection = await self._connected()
        method = b"GET" if body is None else b"POST"
        host = f"{self._target.host}:{self._target.port}"
        head = b"%s %s HTTP/1.1\r\nHost: %s\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
            method, self._target.path.encode(), host.encode(), len(body or b""),
        )  # fmt: skip
        return await connection.exchange(head + (body or b""))

    async def _connected(self) -> "_Connection":
        if self._connection is None or self._connection.is_closed:
            context = ssl.create_default_context() if self._target.is_tls else None
            loop = asyncio.get_running_loop()
            _, self._connection = await loop.create_connection(_Connection, self._target.host, self._target.port, ssl=context)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class _Connection(asyncio.Protocol):
    """Feeds arriving bytes to the parser, whose callbacks fill the one response under way."""

    def __init__(self) -> None:
        self.is_closed = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._response: Response | None = None
        self._finished: asyncio.Future[None] | None = None
        self._arrival = 0.0

    async def exchange(self, request: bytes) -> Response:
        assert self._transport is not None and self._finished is None, "one request at a time"
        self._finished = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        response = self._response = Response(sent_at=perf_counter())
        self._transport.write(request)
        try:
            await self._finished
        except asyncio.CancelledError:  # the caller's deadline: what is still on its way must not meet the next request
            self.close()
            raise
        finally:
            self._finished = None
        if not self._parser.should_keep_alive():
            self.close()
        return response

    def close(self) -> None:
        self.is_closed = True
        if self._transport is not None:
            self._transport.close()

    # -- called by the event loop --
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._arrival = perf_counter()
        if self._parser is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not an HTTP answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True
        self._fail(ConnectionResetError("the connection closed before the answer ended"))

    def _fail(self, error: Exception) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_exception(error)

    # -- called by the parser --
    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._response is not None
        self._response.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        assert self._response is not None
        self._response.pieces.append((self._arrival, body))

    def on_message_complete(self) -> None:
        assert self._response is not None and self._parser is not None
        self._response.status = self._parser.get_status_code()
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)
