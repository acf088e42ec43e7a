"""Where a source rank is asked for pages of its pool by other hosts: the giving end of the family `collective`.

    target                                    desk, a thread per connection
      hello {token, wires, device}     ──►    checks the token, chooses the wire
      ◄──  welcome {wire, port | unique id}   both build the wire: two ranks of a communicator of their own
      send {pages, heads, chunk_pages} ──►    checks them
      ◄──  {ok} or {error}
      ◄══  chunks of pages over the wire      pack, send, pack, send, …

A target that is gone, slow or stopped costs its own thread until the timeout, never a step. Which pages are still pinned is not known
here: the target asks for that after the copy (docs/protocol.md, hand-over), and throws away what was not.
"""

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from typing import Any

import torch

from coordinator.errors import ConfigError, Unavailable
from workers.kv_cache import KVCache
from workers.transfer import staging
from workers.transfer.control import Control
from workers.transfer.gloo_wire import SOURCE, GlooWire
from workers.transfer.moves import TIMEOUT_S
from workers.transfer.wire import Wire

log = logging.getLogger(__name__)

MAX_PEERS = 128           # target ranks connected at once
CLOSE_S = 2.0
RETRY_S = 0.1


class Desk:
    """Listens from the start; `address` is what a handle carries: host, port and a token that a stranger does not know."""

    def __init__(self, pool: KVCache, host: str, silence_s: float = TIMEOUT_S) -> None:
        """`host`: the address to listen on, one of this machine that the targets reach. Raises ConfigError if it is none."""
        self._pool = pool
        self._silence_s = silence_s
        self._token = secrets.token_hex(16)
        self._is_closed = False
        self._peers: dict[Control, threading.Thread] = {}
        try:
            self._listener = socket.create_server((host, 0), backlog=MAX_PEERS)
        except OSError as error:
            raise ConfigError(f"--kv_host {host}: {error.strerror}") from None
        if pool.device.type == "cuda":
            staging.warm_up(pool)
        self.address = f"{host}:{self._listener.getsockname()[1]}:{self._token}"
        threading.Thread(target=self._accept, name="KV desk", daemon=True).start()

    def close(self) -> None:
        """Ends what is under way too. A process must not exit with such threads in the middle of a communicator's calls."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        threads = dict(self._peers)
        for control in threads:
            control.close()
        for thread in threads.values():
            thread.join(CLOSE_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, (host, *_) = self._listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                log.warning("KV desk: %s", error)  # one that came and went, or too many open files: the next may find it better
                time.sleep(RETRY_S)
                continue
            if len(self._peers) >= MAX_PEERS:
                log.warning("KV desk: %s turned away, %d targets are connected", host, MAX_PEERS)
                sock.close()
                continue
            control = Control(sock)
            thread = self._peers[control] = threading.Thread(target=self._serve, args=(control, host), name=f"KV desk {host}", daemon=True)
            thread.start()

    def _serve(self, control: Control, host: str) -> None:
        wire: Wire | None = None
        try:
            wire = self._welcome(control)
            with _stream_of(self._pool, wire):
                while True:
                    self._give(control, wire, control.receive(None))
        except Unavailable as error:
            log.info("KV desk: target at %s: %s", host, error)
        except Exception:
            log.exception("KV desk: target at %s", host)
        finally:
            if wire is not None:
                wire.close()
            control.close()
            self._peers.pop(control, None)

    def _welcome(self, control: Control) -> Wire:
        hello = control.receive(self._silence_s)
        if not hmac.compare_digest(str(hello.get("token")), self._token):
            control.send(error="refused: a wrong token")
            raise Unavailable("came with a wrong token")
        device = str(hello.get("device"))
        if self._pool.device.type == "cuda" and device not in ("", device_id(self._pool)):
            from workers.transfer.nccl_wire import NcclWire, new_unique_id

            unique_id = new_unique_id()
            control.send(wire="nccl", unique_id=unique_id)
            return NcclWire(unique_id, SOURCE, self._pool.device, self._silence_s, control.is_peer_there)
        store = GlooWire.open_store(control.host, self._silence_s)
        control.send(wire="gloo", port=store.port)
        return GlooWire(store, SOURCE, control.host, self._silence_s)

    def _give(self, control: Control, wire: Wire, request: dict[str, Any]) -> None:
        try:
            pages, head, num_heads, chunk_pages = (request[name] for name in ("pages", "head", "num_heads", "chunk_pages"))
            self._pool.check_pages(pages)
            columns = self._pool.columns(head, num_heads)
            if chunk_pages < 1 or not pages:
                raise ValueError("no pages")
        except (KeyError, TypeError, ValueError) as error:
            control.send(ok=False, error=f"{type(error).__name__}: {error}"[:300])
            return
        control.send(ok=True)
        for chunk in staging.chunks(pages, chunk_pages):
            wire.send(staging.pack(self._pool, chunk, head, num_heads).to(wire.device))
        num_bytes = len(pages) * self._pool.flat.shape[0] * self._pool.page_size * (columns.stop - columns.start) * self._pool.flat.itemsize
        wire.finish(num_bytes, control.is_peer_there)


def device_id(pool: KVCache) -> str:
    """Which GPU a pool is on, "" for none: a collective library may refuse two ranks on one."""
    return str(torch.cuda.get_device_properties(pool.device).uuid) if pool.device.type == "cuda" else ""


def _stream_of(pool: KVCache, wire: Wire) -> torch.cuda.StreamContext:
    """Beside the steps, after whose kernels those of a default stream would wait. Nothing on a CPU."""
    stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None
    return torch.cuda.stream(stream)
