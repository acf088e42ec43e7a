"""The group's desk, on node 0: seats ranks, says when a group is whole, says at once when it is not any more. It keeps nothing on disk.

It listens at --nccl_host:--nccl_port, the one address that all nodes know; everything else (stores, step channels) is told through it.
Generations only grow, also over a restart of the desk: a rank of an older group can never be taken for one of the new.
"""

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from coordinator.errors import ConfigError, MalformedMessage
from coordinator.messages import decode_map, encode_map
from coordinator.rendezvous import CRASHED, DONE, HEADER, MAX_FRAME_BYTES, SILENCE_S, VANISHED
from coordinator.tasks import end

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class _Chair:
    """A connected rank."""

    rank: int
    writer: asyncio.StreamWriter
    facts: dict[str, str]
    endpoints: dict[str, str]

    def tell(self, **body: Any) -> None:
        data = encode_map(body)
        if not self.writer.is_closing():
            self.writer.write(HEADER.pack(len(data)) + data)


@dataclass(slots=True)
class _Group:
    size: int
    chairs: dict[int, _Chair] = field(default_factory=dict)
    is_formed: bool = False


class Desk:
    """`services` are the URLs that other nodes ask for, `facts` the flags that must be equal on all nodes.

    start() raises ConfigError when the address cannot be listened at.
    """

    def __init__(self, host: str, port: int, token: str, *, services: dict[str, str] | None = None,
                 facts: dict[str, str] | None = None) -> None:
        self._host, self._port, self._token = host, port, token
        self._services = services or {}
        self._facts = facts or {}
        self._groups: dict[str, _Group] = {}
        self._generation = 0
        self._listening = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="desk", daemon=True)

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        self._thread.start()
        self._listening.wait(START_TIMEOUT_S)
        if self._failure is not None:
            raise ConfigError(f"--nccl_host {self._host} --nccl_port {self._port}: {self._failure.strerror}")

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)

    def __enter__(self) -> "Desk":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, self._host, self._port))
        except OSError as error:
            self._failure = error
            self._loop.close()
            self._listening.set()
            return
        self._port = server.sockets[0].getsockname()[1]
        self._listening.set()
        self._loop.run_forever()
        self._loop.run_until_complete(_close(server))
        self._loop.close()

    # ---- one connection ----

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            body = await asyncio.wait_for(_receive(reader), SILENCE_S)
            if body is not None and not hmac.compare_digest(str(body.get("token", "")).encode(), self._token.encode()):
                _refuse(writer, "the token is another one than that of node 0: TOKENMILL_CLUSTER_TOKEN must be the same on all nodes")
            elif body is not None and body.get("op") == "node":
                self._answer_node(writer, body)
            elif body is not None and body.get("op") == "join":
                await self._seat(reader, writer, body)
        except asyncio.CancelledError:
            pass  # the desk stops
        except TimeoutError:
            log.warning("desk: a connection was closed: it said nothing for %g s", SILENCE_S)
        except (MalformedMessage, KeyError, TypeError, ValueError) as error:
            log.warning("desk: a connection was closed: %s", error)
        finally:
            writer.close()  # sends what is buffered first

    def _answer_node(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        if (difference := _difference(self._facts, body["facts"], "node 0")) is not None:
            _refuse(writer, difference)
        else:
            _write(writer, op="services", **self._services)

    async def _seat(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        name, rank, size = str(body["group"]), int(body["rank"]), int(body["size"])
        chair = _Chair(rank, writer, dict(body["facts"]), dict(body["endpoints"]))
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(size)
        if group.size != size or not 0 <= rank < size:
            _refuse(writer, f"rank {rank} of {size}, and the group {name} has {group.size} ranks")
            return
        if group.is_formed:
            self._break(group, rank, VANISHED, "it joined anew")
        for other in group.chairs.values():
            if other.rank != rank and (difference := _difference(other.facts, chair.facts, f"rank {other.rank}")) is not None:
                _refuse(writer, difference)
                return
        if (former := group.chairs.get(rank)) is not None:
            former.writer.close()
        group.chairs[rank] = chair
        self._form(group, name)
        why, text = await self._listen(reader, chair)
        if group.chairs.get(rank) is chair:
            del group.chairs[rank]
            if group.is_formed:
                log.warning("group %s: rank %d %s %s", name, rank, why, text)
                self._break(group, rank, why, text)

    def _form(self, group: _Group, name: str) -> None:
        missing = sorted(set(range(group.size)) - set(group.chairs))
        if missing:
            for chair in group.chairs.values():
                chair.tell(op="waiting", missing=", ".join(map(str, missing)))
            return
        self._generation = max(self._generation + 1, int(time.time() * 1000))
        group.is_formed = True
        log.info("group %s: %d ranks, generation %d", name, group.size, self._generation)
        endpoints = [group.chairs[rank].endpoints for rank in range(group.size)]
        for chair in group.chairs.values():
            chair.tell(op="formed", generation=self._generation, endpoints=endpoints)

    def _break(self, group: _Group, rank: int, why: str, text: str) -> None:
        others, group.chairs, group.is_formed = group.chairs, {}, False
        for chair in others.values():
            if chair.rank != rank:
                chair.tell(op="broken", rank=rank, why=why, text=text)

    async def _listen(self, reader: asyncio.StreamReader, chair: _Chair) -> tuple[str, str]:
        """Until it leaves or is gone: why, and what it said."""
        while True:
            try:
                body = await asyncio.wait_for(_receive(reader), SILENCE_S)
            except TimeoutError:
                return VANISHED, f"(silent for {SILENCE_S:g} s)"
            if body is None:
                return VANISHED, ""
            if body.get("op") == "leave":
                return (CRASHED if body.get("why") == CRASHED else DONE), str(body.get("text", ""))
            chair.tell(op="beat")


async def _close(server: asyncio.Server) -> None:
    server.close()
    await end(asyncio.all_tasks() - {asyncio.current_task()})
    await asyncio.sleep(0.01)  # transports close in callbacks


def _difference(theirs: dict[str, str], ours: dict[str, str], whose: str) -> str | None:
    for name in theirs.keys() | ours.keys():
        if theirs.get(name) != ours.get(name):
            return f"{name} is {ours.get(name)} here and {theirs.get(name)} for {whose}: it must be the same for all ranks"
    return None


def _refuse(writer: asyncio.StreamWriter, reason: str) -> None:
    log.warning("desk: refused: %s", reason)
    _write(writer, op="refused", reason=reason)


def _write(writer: asyncio.StreamWriter, **body: Any) -> None:
    data = encode_map(body)
    writer.write(HEADER.pack(len(data)) + data)


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """None at the end of the stream."""
    try:
        (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if size > MAX_FRAME_BYTES:
            raise MalformedMessage(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
        return decode_map(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
