"""This rank among the others: whom it computes with, and the collectives they share. On one rank every collective is a no-op.

Who starts the processes and calls torch.distributed.init_process_group is not known here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from workers.cut import Cut
from workers.one_shot import OneShotAllReduce
from workers.parallel_sizes import ONE_RANK, ParallelSizes

__all__ = ["ONE", "ONE_RANK", "Parallel", "ParallelSizes", "RankGroup", "Work", "without_multicast"]


# The name is newer than the oldest torch that we take, and the older one warns where both are there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def without_multicast() -> None:
    """Before init_process_group: NVLink multicast, which shares a switch with other users of the machine, is used only if asked for."""
    for name, off in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(name, off)


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """On a CPU until it is done; on a GPU the current stream waits for it, the host does not."""
        ...


class _Done:
    def wait(self) -> None:
        pass


DONE = _Done()


def _rows(gathered: Tensor) -> Tensor:
    """[size, N, ...] as the library wants it: one rank's rows below the other's."""
    return gathered.flatten(0, 1) if gathered.dim() > 1 else gathered


class RankGroup:
    """Some ranks that compute together, and this one's place among them. All of them must make the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        assert 0 <= rank < size
        self.rank = rank
        self.size = size
        self.group = group
        self.one_shot: OneShotAllReduce | None = None

    def cut(self, dim: int, whole: int) -> Cut:
        """This rank's equal part of a dimension. `validate` of the sizes has made sure that there is one."""
        assert whole % self.size == 0
        return Cut(dim, self.rank * (whole // self.size), whole)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks: x itself, or a new tensor."""
        if self.one_shot is not None and self.one_shot.takes(x):
            return self.one_shot(x)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...] of each rank, all of one shape -> [size, ...]"""
        if self.size == 1:
            return x.unsqueeze(0)
        out = x.new_empty(self.size, *x.shape)
        _all_gather(_rows(out), x.contiguous(), group=self.group)  # on the current stream, as all that is waited for at once
        return out

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Work]:
        """`all_gather` under way: the result may be read after the wait. x must stay as it is until then."""
        if self.size == 1:
            return x.unsqueeze(0), DONE
        out = x.new_empty(self.size, *x.shape)
        work = _all_gather(_rows(out), x.contiguous(), group=self.group, async_op=True)
        assert work is not None
        return out, work

    def start_all_to_all(self, x: Tensor, sent: Sequence[int] | None = None, received: Sequence[int] | None = None) -> tuple[Tensor, Work]:
        """x [N, ...]: its rows go to the ranks in order, `sent` rows to each; None: equally many. As many come back as `received` says."""
        if self.size == 1:
            return x, DONE
        out = x.new_empty(x.shape[0] if received is None else sum(received), *x.shape[1:])
        work = dist.all_to_all_single(out, x.contiguous(), None if received is None else list(received),
                                      None if sent is None else list(sent), group=self.group, async_op=True)
        assert work is not None
        return out, work

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return int(smallest)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """x of the rank `source` of this group, in place on the others."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=source)
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """This rank's view. `attn`: the ranks of its dp group, over which layers are split; `world`: all ranks, over which experts are
    spread with MOE_MODE=EP."""

    sizes: ParallelSizes
    rank: int
    attn: RankGroup
    world: RankGroup

    @classmethod
    def single(cls) -> "Parallel":
        return cls(sizes=ONE_RANK, rank=0, attn=RankGroup(), world=RankGroup())

    @classmethod
    def join(cls, sizes: ParallelSizes, all_ranks: dist.ProcessGroup | None = None) -> "Parallel":
        """After init_process_group over `sizes.tp` ranks; every rank calls it. `all_ranks` where the process group has further ones."""
        all_ranks = all_ranks or dist.group.WORLD
        assert dist.get_world_size(all_ranks) == sizes.tp
        rank = dist.get_rank(all_ranks)
        world = RankGroup(rank, sizes.tp, all_ranks)
        attn = world if sizes.dp == 1 else RankGroup()
        if 1 < sizes.attn_tp < sizes.tp:
            first = sizes.dp_rank(rank) * sizes.attn_tp
            members = dist.get_process_group_ranks(all_ranks)[first : first + sizes.attn_tp]
            attn = RankGroup(rank - first, sizes.attn_tp, dist.new_group(members, use_local_synchronization=True))
        if sizes.one_shot_bytes and attn.group is not None:
            attn.one_shot = OneShotAllReduce(attn.group, sizes.one_shot_bytes)
        return cls(sizes=sizes, rank=rank, attn=attn, world=world)


ONE = Parallel.single()
