"""A wire between two CPUs: a gloo communicator of its own for one pair of processes, without a global group.

gloo gives the interpreter back while it waits and notices a peer's death by its closed sockets at once. One that is merely silent
ends the wait by the timeout; nothing else would.
"""

import contextlib
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coordinator.errors import Unavailable
from workers.transfer.moves import TIMEOUT_S

SOURCE, TARGET = 0, 1
gloo: Any = getattr(dist, "ProcessGroupGloo", None)  # torch's own declarations of them lack what is used here
tcp_store: Any = getattr(dist, "TCPStore", None)


class GlooWire:
    """The end of `rank`, SOURCE or TARGET. `host` is the address of our side of the pair's control connection: data goes the same way."""

    device = torch.device("cpu")

    def __init__(self, store: Any, rank: int, host: str, timeout_s: float = TIMEOUT_S) -> None:
        self._peer = 1 - rank
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host, lazy_init=False)]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 1
        try:
            self._group: Any = gloo(store, rank, 2, options)
        except RuntimeError as error:
            raise Unavailable(f"no gloo connection: {_first_line(error)}") from None

    @classmethod
    def open_store(cls, host: str, timeout_s: float = TIMEOUT_S) -> Any:
        """The source's: where both ends leave their addresses, listening on `host` alone."""
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        return tcp_store(host, port, 2, True, timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=listener.detach())

    @classmethod
    def join_store(cls, host: str, port: int, timeout_s: float = TIMEOUT_S) -> Any:
        try:
            return tcp_store(host, port, 2, False, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise Unavailable(f"no rendezvous at {host}:{port}: {_first_line(error)}") from None

    def send(self, tensor: Tensor) -> None:
        self._wait(lambda group: group.send([tensor], self._peer, 0))

    def receive(self, tensor: Tensor) -> None:
        self._wait(lambda group: group.recv([tensor], self._peer, 0))

    def finish(self, num_bytes: int, is_peer_there: Callable[[], bool]) -> None:
        """Each send and receive was waited for."""

    def _wait(self, start: Callable[[Any], dist.Work]) -> None:
        if self._group is None:
            raise Unavailable("this wire is closed")
        try:
            start(self._group).wait()
        except RuntimeError as error:
            self.close()
            raise Unavailable(f"gloo: {_first_line(error)}") from None

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
