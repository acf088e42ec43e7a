"""Chains: subjects of the OUT stream on which every frame names the one before, so that the server is the fence.

    Chain          the owner's side: append frames, one in flight, over broker outages, never twice
    fence          the taker's side: end somebody's chain with a tombstone
    read_frames    what readers have been or will be shown
"""

import asyncio
import logging

from coordinator.connection import ApiError
from coordinator.errors import Fenced, MalformedMessage, Unavailable
from coordinator.jetstream import WRONG_LAST_SEQUENCE, JetStream, StoredMessage
from coordinator.messages import Frame
from coordinator.subjects import OUT

logger = logging.getLogger(__name__)

EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"


class Chain:
    """The frames that one incarnation appends for one producer. A new incarnation has a new subject, so it starts empty.

    append() calls are served one after another; once fenced, every further one raises Fenced.
    """

    def __init__(self, connection: JetStream, subject: str) -> None:
        self.subject = subject
        self.is_fenced = False
        self._connection = connection
        self._last_seq = 0
        # Sent after _last_seq and not known to be refused: at most one of them stands on the chain.
        self._unconfirmed: list[bytes] = []
        self._turn = asyncio.Lock()

    async def append(self, frame: bytes, deadline_s: float | None = None) -> int:
        """Store an encoded Frame: its stream sequence. Without a deadline it is tried until the connection is closed.

        Raises Fenced, PayloadTooLarge, or Unavailable: then the frame may still come to stand on the chain, before any later one.
        """
        async with self._turn:
            if self.is_fenced:
                raise Fenced(self.subject)
            if frame not in self._unconfirmed:
                self._unconfirmed.append(frame)
            self._last_seq = await self._connection.retry(
                lambda attempt_s: self._try_append(frame, attempt_s), deadline_s, f"append to {self.subject}")
            self._unconfirmed.clear()
            return self._last_seq

    async def _try_append(self, frame: bytes, attempt_s: float) -> int:
        while True:
            try:
                return await self._connection.store(self.subject, frame, {EXPECTED_LAST: str(self._last_seq)}, attempt_s)
            except ApiError as error:
                if error.err_code != WRONG_LAST_SEQUENCE:
                    raise
            tail = await self._connection.last_message(OUT, self.subject, attempt_s)
            if tail is None:
                self._last_seq = 0    # our last frame aged out, and no tombstone stands there: begin again
            elif tail.seq == self._last_seq:
                raise Unavailable("the broker refused the sequence that it reports itself")
            elif tail.seq > self._last_seq and tail.data == frame:
                return tail.seq       # an earlier try was stored, only its acknowledgement was lost
            elif tail.seq > self._last_seq and tail.data in self._unconfirmed:
                self._last_seq = tail.seq   # so was a frame whose append had been given up
            else:
                self._be_fenced(tail)

    def _be_fenced(self, tail: StoredMessage) -> None:
        self.is_fenced = True
        if tail.seq < self._last_seq:
            logger.error("%s: the broker lost frames that it had acknowledged (%d, now %d)", self.subject, self._last_seq, tail.seq)
        raise Fenced(self.subject)


async def fence(connection: JetStream, subject: str, by: str, deadline_s: float = 10.0) -> int:
    """End a chain: its owner's next frame is refused from here on. Returns the tombstone's stream sequence.

    A tombstone that stands there already is kept, whoever set it. Works on a chain without frames. Raises Unavailable.
    """
    tombstone = Frame(tombstone=by).encode()

    async def attempt(attempt_s: float) -> int:
        while True:   # an owner that still appends moves the tail between our look and our publish
            tail = await connection.last_message(OUT, subject, attempt_s)
            if tail is not None and is_tombstone(tail.data):
                return tail.seq
            try:
                return await connection.store(subject, tombstone, {EXPECTED_LAST: str(tail.seq if tail else 0)}, attempt_s)
            except ApiError as error:
                if error.err_code != WRONG_LAST_SEQUENCE:
                    raise

    return await connection.retry(attempt, deadline_s, f"fence of {subject}")


async def read_frames(connection: JetStream, subject_filter: str, start_seq: int = 0, start_time_ms: int | None = None,
                      deadline_s: float = 10.0) -> tuple[list[tuple[str, int, Frame]], int]:
    """((subject, stream sequence, frame) in stored order, number of malformed ones left out). Raises Unavailable."""
    stored = await connection.read_stream(OUT, subject_filter, start_seq=start_seq, start_time_ms=start_time_ms, deadline_s=deadline_s)
    frames, num_malformed = [], 0
    for message in stored:
        try:
            frames.append((message.subject, message.seq, Frame.decode(message.data)))
        except MalformedMessage as error:
            num_malformed += 1
            logger.warning("%s: frame %d left out: %s", message.subject, message.seq, error)
    return frames, num_malformed


def is_tombstone(data: bytes) -> bool:
    try:
        return bool(Frame.decode(data).tombstone)
    except MalformedMessage:
        return False
