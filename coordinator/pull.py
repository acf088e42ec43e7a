"""Take messages from consumers by raw pull requests, and answer them (ack, nak, progress, term) from any connection.

The client library's fetch() is not used: it keeps waiting over a broker restart, hides why a pull ended, and may swallow a
message when it is cancelled. Here every message that arrives lands in one queue, whatever happens to the task that waits.
"""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from coordinator.connection import Connection, Message, Subscription
from coordinator.errors import Unavailable
from coordinator.subjects import ACK_WAIT_S

logger = logging.getLogger(__name__)

NANOS = 1_000_000_000
OVERDUE_S = 1.0              # a pull that the server has not ended this long after its expiry is given up
RENEW_PAUSE_S = 0.1          # before a pull that failed is sent again
STANDING_EXPIRES_S = 30.0


@dataclass(frozen=True, slots=True)
class AckInfo:
    """What an ack subject says. `num_delivered` counts from 1 and is no fence: it starts again after a broker restart."""

    stream: str
    consumer: str
    num_delivered: int
    stream_seq: int
    timestamp_ms: int
    num_pending: int


def parse_ack_subject(subject: str) -> AckInfo:
    """Raises ValueError on anything but a JetStream ack subject (with or without domain and account hash)."""
    parts = subject.split(".")
    if parts[:2] != ["$JS", "ACK"] or len(parts) not in (9, 11, 12):
        raise ValueError(f"not an ack subject: {subject:.200}")
    stream, consumer, delivered, stream_seq, _, timestamp_ns, pending = parts[2:9] if len(parts) == 9 else parts[4:11]
    return AckInfo(stream, consumer, int(delivered), int(stream_seq), int(timestamp_ns) // 1_000_000, int(pending))


async def ack(connection: Connection, ack_subject: str) -> None:
    """Delete the message: its work is done and committed. Not confirmed; a lost one leads to a redelivery."""
    await connection.publish(ack_subject, b"+ACK")


async def ack_sync(connection: Connection, ack_subject: str, deadline_s: float = 5.0) -> None:
    """ack(), and wait until the server has it. Raises Unavailable."""
    await connection.retry(lambda attempt_s: connection.ask(ack_subject, b"+ACK", timeout_s=attempt_s), deadline_s, "ack")


async def nak(connection: Connection, ack_subject: str, delay_s: float = 0.0) -> None:
    """Give the message back: delivered again after the delay. Only for whoever holds the job's claim (a stale nak re-queues it)."""
    body = b"-NAK" if delay_s <= 0 else b"-NAK " + json.dumps({"delay": int(delay_s * NANOS)}).encode()
    await connection.publish(ack_subject, body)


async def progress(connection: Connection, ack_subject: str) -> None:
    """Still at work: the redelivery timer starts anew."""
    await connection.publish(ack_subject, b"+WPI")


async def term(connection: Connection, ack_subject: str, reason: str = "") -> None:
    """Delete the message, for good: it can never be served."""
    await connection.publish(ack_subject, b"+TERM " + reason.replace("\n", " ").encode()[:200] if reason else b"+TERM")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivered message. `received_s` is the event loop's time of arrival, `timestamp_ms` the Unix time when it was stored."""

    connection: Connection = field(repr=False)
    subject: str
    data: bytes = field(repr=False)
    ack_subject: str
    consumer: str
    stream_seq: int
    num_delivered: int
    timestamp_ms: int
    received_s: float

    async def ack(self) -> None:
        await ack(self.connection, self.ack_subject)

    async def ack_sync(self, deadline_s: float = 5.0) -> None:
        await ack_sync(self.connection, self.ack_subject, deadline_s)

    async def nak(self, delay_s: float = 0.0) -> None:
        await nak(self.connection, self.ack_subject, delay_s)

    async def in_progress(self) -> None:
        await progress(self.connection, self.ack_subject)

    async def term(self, reason: str = "") -> None:
        await term(self.connection, self.ack_subject, reason)


@dataclass(slots=True, eq=False)
class Pull:
    """One open pull request. `ended` resolves to why: filled, expired, empty, overdue, missing (no such consumer), or refused: …"""

    consumer: str
    num_left: int
    no_wait: bool
    expires_at: float          # event loop's time
    ended: "asyncio.Future[str]" = field(repr=False)
    token: str = ""
    overdue: asyncio.TimerHandle | None = field(default=None, repr=False)


class Puller:
    """Keeps pulls open on any number of consumers; all deliveries arrive on `deliveries`, in order per consumer.

        async with await Puller.open(bus) as puller:
            puller.want("jobs-m-interactive-any", 4)      # up to 4 more, kept open over expiry and broker restarts
            delivery = await puller.next()

    Credits of want() are spent by deliveries; call it again whenever there is room. After a broker restart up to one batch
    more than wanted may come. close() gives back (nak) what was delivered but not taken from the queue;
    the connection's close() closes its pullers.
    """

    def __init__(self, connection: Connection) -> None:
        self.deliveries: asyncio.Queue[Delivery] = asyncio.Queue()
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._tokens = count(1)
        self._pulls: dict[str, Pull] = {}
        self._wanted: defaultdict[str, int] = defaultdict(int)
        self._pulls_of: defaultdict[str, dict[str, Pull]] = defaultdict(dict)   # the same by consumer, oldest first
        self._short: set[str] = set()        # consumers that may have fewer open pulls than wanted
        self._missing: set[str] = set()
        self._resting: set[str] = set()      # consumers whose last pull failed a moment ago
        self._is_short = asyncio.Event()     # `_short` has some
        self._keeper: asyncio.Task[None] | None = None
        self._remove_hooks: Callable[[], None] = lambda: None
        self._is_closed = False

    @classmethod
    async def open(cls, connection: Connection) -> "Puller":
        self = cls(connection)
        self._remove_hooks = connection.add_hooks(lost=self._lost, restored=self._restored, closing=self.close)
        await self._listen()
        self._keeper = self._loop.create_task(self._keep_open())
        return self

    async def __aenter__(self) -> "Puller":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def next(self) -> Delivery:
        """The next delivery. Cancelling it loses nothing."""
        return await self.deliveries.get()

    def num_open(self, consumer: str) -> int:
        """How many messages the open pulls of this consumer may still bring."""
        return sum(pull.num_left for pull in self._pulls_of[consumer].values())

    async def pull(self, consumer: str, batch: int, expires_s: float, no_wait: bool = False) -> Pull:
        """One pull: up to `batch` messages until `expires_s`; with no_wait only what is there now. Sent again after a reconnect."""
        if self._is_closed:
            raise Unavailable("the puller was closed")
        pull = Pull(consumer, batch, no_wait, self._loop.time() + expires_s, self._loop.create_future())
        await self._send(pull)
        return pull

    def want(self, consumer: str, num_messages: int) -> None:
        """Be ready for this many messages from now on. Lowering it takes effect when the open pulls expire."""
        self._wanted[consumer] = num_messages
        if num_messages:
            self._look_at(consumer)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._remove_hooks()
        if self._keeper is not None:
            self._keeper.cancel()
        for pull in list(self._pulls.values()):
            self._end(pull, "closed")
        if self._subscription is not None:
            await self._subscription.close()
        await self._give_back()

    async def _give_back(self) -> None:
        while not self.deliveries.empty():
            delivery = self.deliveries.get_nowait()
            # Past ack_wait somebody else may hold it, and a nak would take it from them.
            if self._loop.time() - delivery.received_s < ACK_WAIT_S:
                try:
                    await delivery.nak()
                except Unavailable:
                    return   # redelivered after ack_wait

    async def _listen(self) -> None:
        # A new inbox for each connection: pulls of the old one that the server still holds find no listener, instead of
        # delivering on top of those that are sent again.
        self._inbox = self._connection.new_inbox()
        self._subscription = await self._connection.subscribe(f"{self._inbox}.*", self._receive)

    async def _send(self, pull: Pull) -> None:
        expires_s = pull.expires_at - self._loop.time()
        if expires_s <= 0:
            self._end(pull, "expired")
            return
        pull.token = str(next(self._tokens))
        self._pulls[pull.token] = self._pulls_of[pull.consumer][pull.token] = pull
        pull.overdue = self._loop.call_later(expires_s + OVERDUE_S, self._end, pull, "overdue")
        if not self._connection.is_connected:
            return   # sent when the connection is back
        # The server tells in vain of an expiry that comes with no_wait, and refuses one below a millisecond.
        body = {"batch": pull.num_left, **({"no_wait": True} if pull.no_wait else {"expires": max(NANOS // 1000, int(expires_s * NANOS))})}
        stream = pull.consumer.partition("-")[0].upper()
        await self._connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{pull.consumer}", json.dumps(body).encode(),
                                       reply=f"{self._inbox}.{pull.token}")

    def _receive(self, message: Message) -> None:
        if "Status" in message.headers:
            self._take_status(message)
            return
        try:
            info = parse_ack_subject(message.reply)
        except ValueError:
            logger.warning("not a delivery: message on %s with reply %r", message.subject, message.reply)
            return
        self.deliveries.put_nowait(Delivery(self._connection, message.subject, message.data, message.reply, info.consumer,
                                            info.stream_seq, info.num_delivered, info.timestamp_ms, self._loop.time()))
        self._missing.discard(info.consumer)
        self._wanted[info.consumer] = max(0, self._wanted[info.consumer] - 1)
        # The server serves the pulls of one consumer in the order in which they came.
        pull = next(iter(self._pulls_of[info.consumer].values()), None)
        if pull is not None:
            pull.num_left -= 1
            if pull.num_left == 0:
                self._end(pull, "filled")

    def _take_status(self, message: Message) -> None:
        status, description = message.headers["Status"], message.headers.get("Description", "")
        pull = self._pulls.get(message.subject.rpartition(".")[2])
        if pull is None or status == "100":
            return
        if status == "404":
            self._end(pull, "empty")
        elif status == "408":
            self._end(pull, "expired")
        elif status == "503" or "Consumer Deleted" in description:
            if pull.consumer not in self._missing:
                logger.warning("consumer %s does not exist (yet)", pull.consumer)
                self._missing.add(pull.consumer)
            self._end(pull, "missing")
        else:
            logger.info("pull on %s ended: %s %s", pull.consumer, status, description)
            self._end(pull, f"refused: {status} {description}")

    def _end(self, pull: Pull, reason: str) -> None:
        if pull.overdue is not None:
            pull.overdue.cancel()
        self._pulls.pop(pull.token, None)
        self._pulls_of[pull.consumer].pop(pull.token, None)
        if not pull.ended.done():
            pull.ended.set_result(reason)
        if reason not in ("filled", "expired", "empty", "overdue"):
            self._resting.add(pull.consumer)
            self._loop.call_later(RENEW_PAUSE_S, self._rested, pull.consumer)
        if self._wanted[pull.consumer]:
            self._look_at(pull.consumer)

    def _rested(self, consumer: str) -> None:
        self._resting.discard(consumer)
        self._look_at(consumer)

    def _look_at(self, consumer: str) -> None:
        self._short.add(consumer)
        self._is_short.set()

    async def _keep_open(self) -> None:
        """Open pulls for what want() asked for, whenever too few stand."""
        while True:
            await self._is_short.wait()
            self._is_short.clear()
            short, self._short = self._short, set()
            for consumer in short:
                num_short = self._wanted[consumer] - self.num_open(consumer)
                if num_short > 0 and consumer not in self._resting:
                    try:
                        await self.pull(consumer, num_short, STANDING_EXPIRES_S)
                    except Unavailable:
                        return   # closed for good

    async def _lost(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    async def _restored(self) -> None:
        if self._is_closed:
            return
        await self._listen()
        pulls = list(self._pulls.values())
        self._pulls.clear()
        self._pulls_of.clear()
        for pull in pulls:
            if pull.overdue is not None:
                pull.overdue.cancel()
            if pull.num_left > 0:
                await self._send(pull)
