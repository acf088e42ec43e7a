"""The control connection of a pair: small maps over TCP beside the wire that carries pages. Its end tells of the peer's death."""

import contextlib
import select
import socket
from typing import Any

from coordinator.errors import MalformedMessage, Unavailable
from coordinator.messages import decode_map, encode_map
from workers.channel import BlockingChannel

KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host that vanished is noticed while nothing is asked


class Control:
    """One end. Both raise Unavailable when the peer is gone, or silent for too long."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._channel = BlockingChannel(sock)
        self._messages = iter(self._channel)
        self.host: str = sock.getsockname()[0]
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **body: Any) -> None:
        try:
            self._channel.send(encode_map(body))
        except OSError as error:
            raise Unavailable(f"the peer is gone: {error}") from None

    def receive(self, timeout_s: float | None) -> dict[str, Any]:
        """None: as long as it takes. Malformed bytes are as good as a dead peer."""
        self._sock.settimeout(timeout_s)
        try:
            return decode_map(next(self._messages))
        except StopIteration:
            raise Unavailable("the peer is gone") from None
        except TimeoutError:
            raise Unavailable(f"the peer was silent for {timeout_s:g} s") from None
        except (OSError, MalformedMessage) as error:
            raise Unavailable(f"the peer is gone: {error}") from None

    def is_peer_there(self) -> bool:
        """Whether the connection still stands, asked without waiting."""
        try:
            poll = select.poll()  # select knows no descriptor over 1023
            poll.register(self._sock, select.POLLIN)
            return not poll.poll(0) or self._sock.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Also ends a `receive` that waits in another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._channel.close()
