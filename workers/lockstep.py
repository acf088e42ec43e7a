"""Steps that all dp groups run together (MOE_MODE=EP: experts are everywhere, so every rank takes part in every step).

Before each step every leader reports to the conductor, at rank 0, how many tokens it wants to run; the conductor tells all what all
want. Who wants none runs an empty batch. When nobody wants any, all sleep, each in the read of its own inbox; the first to have work
reports, and the conductor wakes the others:

    leader A    (sleeps)  job | report(7, 12 tokens) ............... | go(7) | step ...
    conductor                                 | wake(7) to B, C      | go(7, [12, 0, 0]) once all have reported
    leader B    (sleeps) ............................. | report(7, 0) | go(7) | empty step ...

A dead leader is not this file's business: its group breaks, and all processes end.
"""

import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgpack

from coordinator.errors import MalformedMessage
from workers.batch import Agreed
from workers.channel import GREETING_S, BlockingChannel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What one dp group wants to run in a round. `is_leaving`: it was told to end, and goes on only for the others' sake."""

    round: int
    num_tokens: int
    is_only_decodes: bool
    is_leaving: bool


@dataclass(frozen=True, slots=True)
class Go:
    """What all want: the round is on, unless nobody wants anything."""

    round: int
    num_tokens: tuple[int, ...]
    is_only_decodes: bool
    are_all_leaving: bool


@dataclass(frozen=True, slots=True)
class Wake:
    """Somebody has work: report for this round."""

    round: int


class Conductor:
    """Collects reports, in whatever threads they come. `tell[dp_rank]` hands a message to that leader and never waits."""

    def __init__(self, tell: list[Callable[[Go | Wake], None]]) -> None:
        self._tell = tell
        self._reports: dict[int, Report] = {}
        self._lock = threading.Lock()

    def report(self, dp_rank: int, report: Report) -> None:
        with self._lock:
            is_first = not self._reports
            self._reports[dp_rank] = report
            if len(self._reports) == len(self._tell):
                reports = [self._reports[rank] for rank in range(len(self._tell))]
                self._reports = {}
                go = Go(report.round, tuple(r.num_tokens for r in reports), all(r.is_only_decodes for r in reports),
                        all(r.is_leaving for r in reports))
                for tell in self._tell:
                    tell(go)
            elif is_first:
                for rank, tell in enumerate(self._tell):
                    if rank != dp_rank:
                        tell(Wake(report.round))


class Lockstep:
    """One leader's part. `turn` is called once per round of the engine's loop, `on_wake` puts a Wake into the engine's inbox."""

    def __init__(self, report: Callable[[Report], None]) -> None:
        self._report = report
        self._answers: queue.SimpleQueue[Go] = queue.SimpleQueue()
        self._round = 0              # the last one reported for
        self._is_awake = False       # it had tokens
        self._is_woken = False
        self.on_wake: Callable[[Wake], None] = lambda wake: None
        self.are_all_leaving = False

    def hear(self, message: Go | Wake) -> None:
        """From the conductor, in another thread."""
        if isinstance(message, Go):
            self._answers.put(message)
        else:
            self.on_wake(message)

    def wake(self, wake: Wake) -> None:
        self._is_woken |= wake.round > self._round

    def turn(self, num_tokens: int, *, is_only_decodes: bool, is_leaving: bool = False) -> Agreed | None:
        """What all run now; None: nothing, wait for a command or a Wake."""
        if not (num_tokens or self._is_awake or self._is_woken or is_leaving):
            return None
        self._round += 1
        self._is_woken = False
        self._report(Report(self._round, num_tokens, is_only_decodes, is_leaving))
        go = self._answers.get()
        assert go.round == self._round, f"round {self._round}, and the conductor says {go.round}"
        self.are_all_leaving = go.are_all_leaving
        self._is_awake = any(go.num_tokens)
        return Agreed(max(go.num_tokens), go.is_only_decodes) if self._is_awake else None


# ---- over sockets ----


def encode(message: Report | Go | Wake) -> bytes:
    kind = {Report: "report", Go: "go", Wake: "wake"}[type(message)]
    return msgpack.packb([kind, *(getattr(message, name) for name in message.__slots__)])  # type: ignore[no-any-return]


def decode(data: bytes) -> Report | Go | Wake:
    """Raises MalformedMessage."""
    try:
        kind, *values = msgpack.unpackb(data, use_list=False)
        match kind:
            case "report":
                return Report(*values)
            case "go":
                return Go(*values)
            case "wake":
                return Wake(*values)
    except (ValueError, TypeError, msgpack.StackError, msgpack.FormatError, msgpack.ExtraData) as error:
        raise MalformedMessage(f"not a message of the lockstep: {error}"[:200]) from None
    raise MalformedMessage(f"not a message of the lockstep: {kind!r:.40}")


def conduct(listener: socket.socket, num_leaders: int, check: Callable[[bytes], int]) -> Lockstep:
    """Rank 0: wait for the other leaders, then keep time for all.

    `check` reads a leader's first message and tells its dp rank; MalformedMessage: it is none.
    """
    leaders: dict[int, tuple[BlockingChannel, Iterator[bytes]]] = {}
    while len(leaders) < num_leaders - 1:
        sock, peer = listener.accept()
        channel = _channel(sock)
        try:
            data, messages = channel.greeting(GREETING_S)
            leaders[check(data)] = channel, messages
        except MalformedMessage as error:
            log.warning("a connection from %s was closed: %s", peer[0], error)
            channel.close()
    mine = Lockstep(lambda report: conductor.report(0, report))
    tell: list[Callable[[Go | Wake], None]] = [mine.hear]
    tell += [lambda message, rank=rank: leaders[rank][0].send(encode(message)) for rank in range(1, num_leaders)]  # type: ignore[misc]
    conductor = Conductor(tell)

    def listen(dp_rank: int, messages: Iterator[bytes]) -> None:
        for data in messages:
            report = decode(data)
            assert isinstance(report, Report)
            conductor.report(dp_rank, report)

    for dp_rank, (_, messages) in leaders.items():
        threading.Thread(target=listen, args=(dp_rank, messages), name="lockstep", daemon=True).start()
    return mine


def keep_step(address: tuple[str, int], hello: bytes) -> Lockstep:
    """Any other leader."""
    channel = _channel(socket.create_connection(address))
    channel.send(hello)
    mine = Lockstep(lambda report: channel.send(encode(report)))

    def listen() -> None:
        for data in channel:
            message = decode(data)
            assert not isinstance(message, Report)
            mine.hear(message)

    threading.Thread(target=listen, name="lockstep", daemon=True).start()
    return mine


def _channel(sock: socket.socket) -> BlockingChannel:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return BlockingChannel(sock)
