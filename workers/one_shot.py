"""Sums over ranks for small tensors in one kernel: each rank reads the others' memory directly, where NCCL would pass parts around.

One node, GPUs that reach each other over NVLink; a step of few decodes has only small sums. Off unless asked for: which of the two is
faster depends on the machine.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from coordinator.errors import ConfigError

ALIGNMENT = 16  # bytes that the kernel reads at once


class OneShotAllReduce:
    """For tensors of up to `max_bytes`. All ranks of `group` make it at the same time. Raises ConfigError where it cannot work."""

    def __init__(self, group: dist.ProcessGroup, max_bytes: int) -> None:
        if dist.get_backend(group) != "nccl":
            raise ConfigError("--one_shot_all_reduce_bytes needs CUDA GPUs: leave it at 0")
        from torch.distributed import _symmetric_memory as symmetric

        self._max_bytes = max_bytes
        self._group_name = group.group_name
        device = torch.device("cuda", torch.cuda.current_device())
        self._buffer = symmetric.empty(max_bytes, dtype=torch.uint8, device=device)
        try:
            symmetric.rendezvous(self._buffer, group)
        except RuntimeError as error:
            raise ConfigError("--one_shot_all_reduce_bytes: these GPUs do not reach each other's memory, leave it at 0 "
                              f"({error})") from None

    def takes(self, x: Tensor) -> bool:
        return x.is_floating_point() and 0 < x.nbytes <= self._max_bytes and x.nbytes % ALIGNMENT == 0

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor. The ranks' kernels wait for each other at start and end, so the buffer is free again after it."""
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        out: Tensor = torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._group_name)
        return out
