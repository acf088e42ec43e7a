"""Two ends that send tensors to each other. Which is which, and what the tensors are, is the business of desk.py and collective.py."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Wire(Protocol):
    """One end. Raises Unavailable when the peer is gone or takes too long; after that it can only be closed."""

    device: torch.device    # where tensors have to be; on a GPU everything runs on the current stream

    def send(self, tensor: Tensor) -> None:
        """`tensor` may be changed when the current stream has got so far; on a CPU, when this returns."""
        ...

    def receive(self, tensor: Tensor) -> None: ...

    def finish(self, num_bytes: int, is_peer_there: Callable[[], bool]) -> None:
        """Until everything started is done, that many bytes altogether."""
        ...

    def close(self) -> None: ...
