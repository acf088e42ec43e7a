"""A wire between two GPUs: an NCCL communicator of its own for one pair, watched over by the thread that waits for it.

Sends and receives are kernels on the current stream; between the chunks of a transfer nothing waits. A peer that died or hangs leaves
such a kernel spinning: the watch aborts the communicator, which ends it.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from coordinator.errors import Unavailable
from workers.transfer.moves import TIMEOUT_S, timeout_s
from workers.transfer.nccl import Communicator, NcclError, new_unique_id

__all__ = ["NcclWire", "new_unique_id"]

POLL_S = 0.0001
NUM_QUICK_POLLS = 200    # without a pause: what has been set up once is under way in some microseconds


class NcclWire:
    """The end of `rank`. Built when both ends are; raises Unavailable if the other does not come."""

    def __init__(self, unique_id: bytes, rank: int, device: torch.device, silence_s: float = TIMEOUT_S,
                 is_peer_there: Callable[[], bool] = lambda: True) -> None:
        self.device = device
        self._silence_s = silence_s
        self._is_peer_there = is_peer_there
        torch.cuda.set_device(device)  # of this thread: the communicator belongs to it
        self._comm: Communicator | None = Communicator(unique_id, rank)
        self._until_ready()

    def send(self, tensor: Tensor) -> None:
        self._open.send(tensor.data_ptr(), tensor.nbytes, torch.cuda.current_stream(self.device).cuda_stream)
        self._until_ready()

    def receive(self, tensor: Tensor) -> None:
        self._open.receive(tensor.data_ptr(), tensor.nbytes, torch.cuda.current_stream(self.device).cuda_stream)
        self._until_ready()

    def finish(self, num_bytes: int, is_peer_there: Callable[[], bool]) -> None:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + self._silence_s + timeout_s(num_bytes) - TIMEOUT_S
        while not done.query():
            self._open.is_ready()
            self._pause(is_peer_there, deadline)

    def _until_ready(self) -> None:
        deadline = time.monotonic() + self._silence_s
        for _ in range(NUM_QUICK_POLLS):
            if self._open.is_ready():
                return
        while not self._open.is_ready():
            self._pause(self._is_peer_there, deadline)

    def _pause(self, is_peer_there: Callable[[], bool], deadline: float) -> None:
        time.sleep(POLL_S)
        in_time = time.monotonic() < deadline
        if is_peer_there() and in_time:
            return
        self.close()
        raise Unavailable("NCCL: the peer is gone" if in_time else "NCCL: the peer was silent for too long")

    @property
    def _open(self) -> Communicator:
        if self._comm is None:
            raise NcclError("this wire is closed")
        return self._comm

    def close(self) -> None:
        """What this thread started on the device has ended when this returns: nothing writes to memory that is given back."""
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.abort()
            torch.cuda.current_stream(self.device).synchronize()
