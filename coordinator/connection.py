"""One connection to NATS that stays usable: requests, subscriptions, a true flush, retries. The only `import nats`.

What the client library does not do by itself, and this file does:
- Requests fail at once when the connection drops (their fate unknown) instead of running into their timeout.
- Nothing here uses the library's flush(): it writes PING before what is still buffered, so it is no barrier, and a flush that
  is cancelled or times out breaks the library's read loop when its PONG arrives. A message to ourselves is the barrier.
- A message over the server's limit, headers included, would close the client for good: it is refused before it is sent.
- Errors go to the log as one line per outage, without tracebacks.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import Client

from coordinator import tls
from coordinator.errors import PayloadTooLarge, Unavailable
from coordinator.queue_users import inbox_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

TOO_MANY_MESSAGES = 10077
SIZE_MARGIN_BYTES = 4096      # below the server's max_payload
ATTEMPT_S = 2.0               # one try of a request that is repeated until its deadline
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.25
TRIES_BEFORE_WARNING = 8


class NobodyListens(Unavailable):
    """No subscriber and no stream takes this subject: the request was surely not carried out."""


class ApiError(Unavailable):
    """JetStream answered with an error."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(f"JetStream: {description} ({err_code})")
        self.code = code
        self.err_code = err_code

    @property
    def may_pass(self) -> bool:
        """True if the same request may succeed a moment later (JetStream is starting, or lost its leader)."""
        return self.code == 503 and self.err_code != TOO_MANY_MESSAGES


@dataclass(frozen=True, slots=True)
class Message:
    """What a subscriber gets. `headers` of a republished frame carry Nats-Sequence and Nats-Last-Sequence (on its subject)."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str]


Callback = Callable[[Message], Awaitable[None] | None]


class NatsMessage(Protocol):
    """The part of the library's message that is used here."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


class Subscription:
    """Open until close(); survives reconnects."""

    def __init__(self, connection: "Connection", subject: str, callback: Callback, on_gap: Callable[[], None] | None) -> None:
        self.subject = subject
        self._connection, self._callback, self._on_gap = connection, callback, on_gap
        self._raw: Any = None

    async def close(self) -> None:
        """Every message that the server had sent was handled when this returns."""
        raw, self._raw = self._raw, None
        if raw is None:
            return
        self._connection.forget(self)
        try:
            if self._connection.is_connected:
                await self._connection.unsubscribe_at_server(raw)
            await raw.unsubscribe()
        except (Unavailable, nats.errors.Error):
            pass  # the connection is gone, and the subscription with it

    def attach(self, raw: Any) -> None:
        self._raw = raw

    def owns(self, raw: Any) -> bool:
        return self._raw is raw

    def gap(self) -> None:
        """Messages to this subscription may have been lost (we were too slow, or the connection was down)."""
        if self._on_gap is None:
            return
        try:
            self._on_gap()
        except Exception:
            logger.exception("the gap handler of %s broke", self.subject)

    async def handle(self, raw: NatsMessage) -> None:
        try:
            waiting = self._callback(Message(raw.subject, raw.data, raw.reply, raw.headers or {}))
            if waiting is not None:
                await waiting
        except Exception:
            logger.exception("a message on %s broke its handler", raw.subject)


class Connection:
    """Made by connect(). Reconnects for ever; `on_fatal` is called once if the server closes it for good (bad credentials)."""

    def __init__(self, url: str, name: str, on_fatal: Callable[[Exception], None] | None) -> None:
        self.name, self._url, self._on_fatal = name, url, on_fatal
        self.address = re.sub(r"//[^/@,]*@", "//", url)   # without a password, for messages
        self._client = Client()
        self._connected = asyncio.Event()
        self._is_closing = False
        self._fatal: Unavailable | None = None
        self._last_error = "no answer"
        self._lost_at = 0.0
        self._tokens = count(1)
        self._answers: dict[str, Callable[[NatsMessage | Exception], None]] = {}
        self._subscriptions: set[Subscription] = set()
        self._lost_hooks: list[Callable[[], Awaitable[None]]] = []
        self._restored_hooks: list[Callable[[], Awaitable[None]]] = []
        self._close_hooks: list[Callable[[], Awaitable[None]]] = []
        self._inbox = ""

    @classmethod
    async def connect(cls, url: str, name: str, on_fatal: Callable[[Exception], None] | None = None, *, timeout_s: float = 10.0) -> Self:
        """url may name several servers, separated by commas. Raises Unavailable if none answers in time."""
        self = cls(url, name, on_fatal)
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.connect(
                    servers=self._url.split(","), name=name, error_cb=self._report_error, disconnected_cb=self._lost,
                    reconnected_cb=self._restored, closed_cb=self._closed_for_good, max_reconnect_attempts=-1,
                    reconnect_time_wait=0.25, ping_interval=10, tls=tls.context_for(self._url),
                    inbox_prefix=inbox_of(urlsplit(self._url.split(",")[0]).username or ""))
        except TimeoutError:
            self._is_closing = True
            await self._client.close()
            raise Unavailable(f"NATS at {self.address} did not answer within {timeout_s:g} s: {self._last_error}") from None
        self._connected.set()
        self._inbox = self._client.new_inbox()
        await self._client.subscribe(f"{self._inbox}.*", cb=self._answer)
        return self

    async def close(self) -> None:
        """Close pullers, flush, close. Waiting requests fail with Unavailable."""
        if self._is_closing:
            return
        for hook in list(self._close_hooks):
            await hook()
        if self.is_connected:
            try:
                await self.flush(timeout_s=1.0)
            except Unavailable:
                logger.warning("NATS connection %s: closed before everything was sent", self.name)
        self._is_closing = True
        self._fail_requests(Unavailable("the connection was closed"))
        self._connected.set()   # wakes whoever waits for a reconnect
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set() and not self._is_closing and self._client.is_connected

    @property
    def is_closed(self) -> bool:
        return self._is_closing or self._fatal is not None

    @property
    def max_message_bytes(self) -> int:
        """The largest payload plus headers that publish() takes."""
        return int(self._client.max_payload) - SIZE_MARGIN_BYTES

    @property
    def server_version(self) -> tuple[int, int]:
        version = self._client.connected_server_version
        return int(version.major), int(version.minor)

    # --- core NATS ---------------------------------------------------------------------------------------------------------

    async def publish(self, subject: str, data: bytes = b"", *, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Hand to the connection; while it is down up to 2 MB wait for its return. Raises PayloadTooLarge, Unavailable."""
        size = len(data) + sum(len(key) + len(value) + 4 for key, value in (headers or {}).items())
        if size > self.max_message_bytes:
            raise PayloadTooLarge(size, self.max_message_bytes)
        self._check_open()
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
        except (nats.errors.OutboundBufferLimitError, nats.errors.ConnectionClosedError, nats.errors.ConnectionDrainingError) as error:
            raise Unavailable(f"cannot send to {subject}: {error}") from None

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "",
                        on_gap: Callable[[], None] | None = None) -> Subscription:
        """Messages one after another to `callback`, plain or async. `on_gap` is told when some may have been missed.

        Of the subscribers that name the same `queue` one gets each message.
        """
        self._check_open()
        subscription = Subscription(self, subject, callback, on_gap)
        subscription.attach(await self._client.subscribe(subject, queue=queue, cb=subscription.handle))
        self._subscriptions.add(subscription)
        return subscription

    async def request(self, subject: str, data: bytes = b"", timeout_s: float = 1.0) -> bytes:
        """The first answer's body. Raises NobodyListens, Unavailable (no answer: it may or may not have been carried out)."""
        return (await self.ask(subject, data, timeout_s=timeout_s)).data

    async def flush(self, timeout_s: float = 5.0) -> None:
        """A barrier: when it returns, the server has taken all that was published and subscribed before. Raises Unavailable."""
        # The server handles what one connection sends in order: a message to ourselves comes back after all before it.
        await self.retry(lambda attempt_s: self._ask(None, b"", None, attempt_s), timeout_s, "flush")

    async def ask(self, subject: str, data: bytes = b"", *, headers: dict[str, str] | None = None, timeout_s: float = ATTEMPT_S) -> Message:
        """request(), with headers both ways."""
        return await self._ask(subject, data, headers, timeout_s)

    # --- over outages -------------------------------------------------------------------------------------------------------

    async def retry(self, attempt: Callable[[float], Awaitable[T]], deadline_s: float | None, what: str) -> T:
        """attempt(timeout_s) until it succeeds, over outages; None: until the connection is closed. Raises what cannot pass."""
        give_up_at = float("inf") if deadline_s is None else time.monotonic() + deadline_s
        pause = FIRST_PAUSE_S
        for num_tries in count(1):
            try:
                return await attempt(max(0.001, min(ATTEMPT_S, give_up_at - time.monotonic())))
            except ApiError as error:
                if not error.may_pass:
                    raise
                reason: Unavailable = error
            except Unavailable as error:
                reason = error
            self._check_open()
            if time.monotonic() + pause >= give_up_at:
                raise Unavailable(f"{what}: not done within {deadline_s:g} s: {reason}") from None
            if num_tries == TRIES_BEFORE_WARNING:
                logger.warning("%s: still trying: %s", what, reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)
        raise AssertionError("count() does not end")

    # --- for the files of the bus -------------------------------------------------------------------------------------------

    def add_hooks(self, *, lost: Callable[[], Awaitable[None]], restored: Callable[[], Awaitable[None]],
                  closing: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """`lost` runs before the library sends anything again, `restored` once the connection is back, `closing` while it still works.

        Returns what takes them off again.
        """
        hooks = [(self._lost_hooks, lost), (self._restored_hooks, restored), (self._close_hooks, closing)]
        for registered, hook in hooks:
            registered.append(hook)

        def remove() -> None:
            for registered, hook in hooks:
                registered.remove(hook)

        return remove

    def new_inbox(self) -> str:
        return str(self._client.new_inbox())

    def forget(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    async def unsubscribe_at_server(self, raw: Any) -> None:
        """The server sends no more; what it had sent has arrived. (The library's own unsubscribe drops that.)"""
        await self._client._send_unsubscribe(raw._id)
        await self.flush(timeout_s=1.0)

    # --- inside -------------------------------------------------------------------------------------------------------------

    async def _ask(self, subject: str | None, data: bytes, headers: dict[str, str] | None, timeout_s: float) -> Message:
        answered: asyncio.Future[NatsMessage] = asyncio.get_running_loop().create_future()

        def settle(outcome: NatsMessage | Exception) -> None:
            if answered.done():
                return
            if isinstance(outcome, Exception):
                answered.set_exception(outcome)
            else:
                answered.set_result(outcome)

        raw = await self.exchange(subject, data, headers, timeout_s, answered, settle)
        return Message(raw.subject, raw.data, raw.reply, raw.headers or {})

    async def exchange(self, subject: str | None, data: bytes, headers: dict[str, str] | None, timeout_s: float,
                       done: "asyncio.Future[T]", take: Callable[[NatsMessage | Exception], None]) -> T:
        """Send, and wait for `done`, which `take` settles. Without a subject the message goes straight to our own inbox."""
        token = str(next(self._tokens))
        inbox = f"{self._inbox}.{token}"
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
                self._check_open()
                self._answers[token] = take
                await self.publish(subject or inbox, data, reply=inbox if subject else "", headers=headers)
                return await done
        except TimeoutError:
            raise Unavailable(f"no answer from {subject or 'NATS'} within {timeout_s:g} s"
                              + ("" if self.is_connected else f" (connection lost: {self._last_error})")) from None
        finally:
            self._answers.pop(token, None)
            if not done.cancel() and not done.cancelled():
                done.exception()   # an error that came just after the timeout is not an unhandled one

    async def _answer(self, raw: NatsMessage) -> None:
        take = self._answers.get(raw.subject[len(self._inbox) + 1:])
        if take is None:
            return
        if raw.headers and raw.headers.get("Status") == "503" and not raw.data:
            take(NobodyListens(f"nobody listens on {raw.headers.get('Nats-Subject', 'this subject')}"))
        else:
            take(raw)

    def _check_open(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self._is_closing:
            raise Unavailable("the connection was closed")

    def _fail_requests(self, error: Unavailable) -> None:
        for take in list(self._answers.values()):
            take(error)

    async def _report_error(self, error: Exception) -> None:
        self._last_error = str(error) or type(error).__name__
        if isinstance(error, nats.errors.SlowConsumerError):
            logger.warning("NATS connection %s: too slow for %s, messages were dropped", self.name, error.subject)
            for subscription in [s for s in self._subscriptions if s.owns(error.sub)]:
                subscription.gap()
        elif self.is_connected and not isinstance(error, nats.errors.UnexpectedEOF):
            logger.warning("NATS connection %s: %s", self.name, self._last_error)
        else:
            logger.debug("NATS connection %s: %s", self.name, self._last_error)

    async def _lost(self) -> None:
        if self._is_closing:
            return
        self._connected.clear()
        self._lost_at = time.monotonic()
        logger.warning("NATS connection %s: lost, reconnecting to %s", self.name, self.address)
        self._fail_requests(Unavailable("the connection to NATS was lost"))
        for hook in list(self._lost_hooks):
            await hook()

    async def _restored(self) -> None:
        logger.info("NATS connection %s: back after %.2f s", self.name, time.monotonic() - self._lost_at)
        self._connected.set()
        for subscription in list(self._subscriptions):
            subscription.gap()
        for hook in list(self._restored_hooks):
            try:
                await hook()
            except (Unavailable, nats.errors.Error) as error:   # closed meanwhile; the library's reconnect must not break
                logger.warning("NATS connection %s: %s", self.name, error)

    async def _closed_for_good(self) -> None:
        if self._is_closing:
            return
        self._fatal = Unavailable(f"NATS at {self.address} closed the connection: {self._client.last_error or self._last_error}")
        logger.error("NATS connection %s: %s", self.name, self._fatal)
        self._fail_requests(self._fatal)
        self._connected.set()
        if self._on_fatal is not None:
            self._on_fatal(self._fatal)
