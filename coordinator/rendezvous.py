"""How the ranks of a group find one another, and how each learns that the group is broken: the members' side of the desk (desk.py).

A rank keeps its connection for life. The desk tells all ranks at once when the last has come (`Formed`, with a generation that no group
had before), and tells the others as soon as one is gone (`Broken`): a collective that waits for a dead rank can only be ended with its
process, so whoever hears of it leaves and joins again, under the next generation.
"""

import contextlib
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator.errors import ConfigError, MalformedMessage, Unavailable
from coordinator.group_plan import TOKEN_VARIABLE
from coordinator.messages import decode_map, encode_map

log = logging.getLogger(__name__)

BEAT_S = 1.0
SILENCE_S = 10.0          # a side that says nothing for this long is gone: a stopped process, a node without power
CONNECT_RETRY_S = 0.5
MAX_FRAME_BYTES = 256 * 1024
HEADER = struct.Struct("<I")

# Why a rank left. What its jobs are blamed for follows from it (docs/guarantees.md, poison jobs).
DONE, CRASHED, VANISHED = "done", "crashed", "vanished"

# Exit status of a rank that left because another one did: worker.py and serve.py tell it from a fault of its own.
PEER_STATUS = {DONE: 75, VANISHED: 76, CRASHED: 77}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One rank that asks to join. `facts` must be the same for all ranks (the first that differs is named); `endpoints` tell the others
    where to reach this one."""

    group: str
    rank: int
    size: int
    facts: dict[str, str] = field(default_factory=dict)
    endpoints: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Formed:
    """All are here. `endpoints[r]` are those of rank r."""

    generation: int
    endpoints: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The group is no more, since `rank` left (-1: the desk itself went away)."""

    rank: int
    why: str
    text: str = ""

    @property
    def status(self) -> int:
        return PEER_STATUS[self.why]


class Member:
    """This rank's connection to the desk. `connect`, `join`, then `watch`; `leave` at the end."""

    def __init__(self, sock: socket.socket, token: str) -> None:
        self._sock = sock
        self._token = token
        self._sending = threading.Lock()
        self._broken = threading.Event()
        self.expects_end = False    # all leave in order: that others went first is no news
        self.local_host: str = sock.getsockname()[0]   # an address of ours that the desk's node reaches

    @classmethod
    def connect(cls, desk: str, token: str) -> "Member":
        """Waits for a desk to be there."""
        return cls(connect(desk, "the group's desk"), token)

    def join(self, seat: Seat) -> Formed:
        """Waits for all ranks. Raises ConfigError if this one can never be part of the group, Unavailable if the desk went away."""
        self._send({"op": "join", "token": self._token, "group": seat.group, "rank": seat.rank, "size": seat.size, "facts": seat.facts,
                    "endpoints": seat.endpoints})
        self._beats = threading.Thread(target=self._beat_forever, name="group beat", daemon=True)
        self._beats.start()
        missing = ""
        while True:
            body = receive(self._sock)
            match body and body.get("op"):
                case "formed":
                    assert body is not None
                    return Formed(generation=int(body["generation"]), endpoints=tuple(body["endpoints"]))
                case "refused":
                    assert body is not None
                    raise ConfigError(f"rank {seat.rank}: {body['reason']}")
                case "waiting":
                    assert body is not None
                    if missing != (missing := str(body["missing"])):
                        log.info("rank %d waits for ranks %s", seat.rank, missing)
                case "beat":
                    pass
                case _:
                    raise Unavailable(f"rank {seat.rank}: the group's desk went away while ranks gathered")

    def watch(self, on_broken: Callable[[Broken], None]) -> None:
        """From now on, in a thread of its own. `on_broken` is called once at most."""
        threading.Thread(target=self._watch, args=(on_broken,), name="group watch", daemon=True).start()

    def leave(self, why: str, text: str = "") -> None:
        """Say goodbye; the others are told at once."""
        with contextlib.suppress(OSError):
            self._send({"op": "leave", "why": why, "text": text[:500]})
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Without a word: to the others this rank has vanished."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def others_left_first(self, timeout_s: float) -> bool:
        """A collective failed: because another rank is gone? Then `on_broken` is called within moments, and this is true."""
        return self._broken.wait(timeout_s)

    def _watch(self, on_broken: Callable[[Broken], None]) -> None:
        broken = Broken(rank=-1, why=VANISHED, text="the group's desk (node 0) went away")
        with contextlib.suppress(OSError, MalformedMessage):
            while (body := receive(self._sock)) is not None:
                if body.get("op") == "broken":
                    broken = Broken(rank=int(body["rank"]), why=str(body["why"]), text=str(body["text"]))
                    break
        self._broken.set()
        if not (self.expects_end and broken.why == DONE):
            on_broken(broken)

    def _beat_forever(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(BEAT_S)
                self._send({"op": "beat"})

    def _send(self, body: dict[str, Any]) -> None:
        with self._sending:
            send(self._sock, body)


def ask_services(find_desk: Callable[[], str], token: str, *, node_rank: int, facts: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Where node 0's desk is, and what it tells other nodes: URLs of NATS and Redis. `find_desk` is asked until one answers.

    Waits for node 0; raises ConfigError if the nodes' flags differ.
    """
    told: str | None = None
    while True:
        desk = find_desk()
        try:
            with contextlib.closing(_connect(desk)) as sock:
                send(sock, {"op": "node", "token": token, "node_rank": node_rank, "facts": facts})
                body = receive(sock)
            if body is not None and body.get("op") == "refused":
                raise ConfigError(f"--node_rank {node_rank}: {body['reason']}")
            if body is not None and body.get("op") == "services":
                return desk, {"nats_url": str(body["nats_url"]), "redis_url": str(body["redis_url"])}
        except (OSError, MalformedMessage) as error:
            if told != desk:
                where = desk or "an address that Redis does not know yet"
                print(f"waiting for node 0 at {where} ({error}): --nccl_host and --nccl_port give it", file=sys.stderr, flush=True)
                told = desk
        time.sleep(CONNECT_RETRY_S)


def connect(desk: str, whom: str) -> socket.socket:
    """Until somebody listens at `host:port`. Raises ConfigError for a name that no address belongs to."""
    is_told = False
    while True:
        try:
            return _connect(desk)
        except OSError as error:
            if not is_told:
                log.warning("waiting for %s at %s (%s)", whom, desk, error)
                is_told = True
            time.sleep(CONNECT_RETRY_S)


def _connect(desk: str) -> socket.socket:
    host, _, port = desk.rpartition(":")
    if not host:
        raise OSError("nothing to connect to")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=SILENCE_S)
    except socket.gaierror as error:
        raise ConfigError(f"--nccl_host {host}: {error.strerror}") from None
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, body: dict[str, Any]) -> None:
    data = encode_map(body)
    sock.sendall(HEADER.pack(len(data)) + data)


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """One message; None once the other side is gone or silent. Raises MalformedMessage."""
    header = _exactly(sock, HEADER.size)
    if header is None:
        return None
    (size,) = HEADER.unpack(header)
    if size > MAX_FRAME_BYTES:
        raise MalformedMessage(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    data = _exactly(sock, size)
    return None if data is None else decode_map(data)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        try:
            received = sock.recv(count - len(data))
        except OSError:  # reset, or nothing for SILENCE_S: the socket's timeout
            return None
        if not received:
            return None
        data += received
    return data


def token() -> str:
    """What `serve` left in the environment for its ranks."""
    return os.environ.get(TOKEN_VARIABLE, "")
