"""The family `collective`: pages come over a communicator of two ranks, this one and the source's (desk.py), from any host.

On two GPUs NCCL, else gloo through host memory. Whatever happens to the source, a copy ends: at once when its process died, after a
timeout when it is silent.
"""

import socket

import torch

from coordinator.errors import Unavailable
from workers.kv_cache import KVCache
from workers.transfer import staging
from workers.transfer.control import Control
from workers.transfer.desk import device_id
from workers.transfer.gloo_wire import TARGET, GlooWire
from workers.transfer.moves import TIMEOUT_S, Move
from workers.transfer.wire import Wire


class CollectiveLink:
    """Connected to one desk. Raises Unavailable when opened if it cannot be reached or refuses."""

    IDLE_S = 60.0  # then it is closed: a pair that talks seldom needs no standing connection

    def __init__(self, pool: KVCache, desk: str, stream: torch.cuda.Stream | None = None, silence_s: float = TIMEOUT_S) -> None:
        self._pool = pool
        self._stream = stream
        self._silence_s = silence_s
        host, port, token = _parse(desk)
        try:
            sock = socket.create_connection((host, port), timeout=silence_s)
        except OSError as error:
            raise Unavailable(f"KV desk {host}:{port}: {error.strerror or error}") from None
        self._control = Control(sock)
        try:
            self._wire = self._build_wire(host, token)
        except BaseException:
            self._control.close()
            raise

    def _build_wire(self, host: str, token: str) -> Wire:
        self._control.send(token=token, device=device_id(self._pool))
        welcome = self._control.receive(self._silence_s)
        if "error" in welcome:
            raise Unavailable(f"KV desk {host}: {welcome['error']}")
        if welcome.get("wire") == "nccl":
            from workers.transfer.nccl_wire import NcclWire

            return NcclWire(welcome["unique_id"], TARGET, self._pool.device, self._silence_s, self._control.is_peer_there)
        store = GlooWire.join_store(host, welcome["port"], self._silence_s)
        return GlooWire(store, TARGET, self._control.host, self._silence_s)

    def copy(self, move: Move) -> None:
        self._pool.check_pages(move.dst_pages)
        self._pool.columns(move.heads.target, move.heads.num_heads)
        try:
            with torch.cuda.stream(self._stream):  # of None: the current one
                self._receive(move)
        except BaseException:
            self.close()  # whatever is still on its way belongs to no later copy
            raise

    def _receive(self, move: Move) -> None:
        heads, pool = move.heads, self._pool
        size = staging.pages_per_chunk(pool, heads.num_heads)
        self._control.send(pages=list(move.src_pages), head=heads.source, num_heads=heads.num_heads, chunk_pages=size)
        answer = self._control.receive(self._silence_s)
        if answer.get("ok") is not True:
            raise Unavailable(f"the source refused: {answer.get('error')}")
        num_bytes = 0
        for pages in staging.chunks(move.dst_pages, size):
            packed = staging.empty(pool, len(pages), heads.num_heads, self._wire.device)
            self._wire.receive(packed)
            staging.unpack(packed.to(pool.device), pool, pages, heads.target, heads.num_heads)
            num_bytes += packed.nbytes
        self._wire.finish(num_bytes, self._control.is_peer_there)
        if self._stream is not None:
            self._stream.synchronize()  # through host memory, pages are here when the last unpacking is

    def close(self) -> None:
        self._wire.close()
        self._control.close()


def _parse(desk: str) -> tuple[str, int, str]:
    try:
        host, port, token = desk.rsplit(":", 2)
        return host, int(port), token
    except ValueError:
        raise Unavailable(f"KV desk {desk!r:.80}: not an address") from None
