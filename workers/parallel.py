"""This rank among the others: whom it computes with, and the collectives they share. On one rank every collective is a no-op.

Who starts the processes and calls torch.distributed.init_process_group is not known here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from workers.cut import Cut
from workers.parallel_sizes import ONE_RANK, ParallelSizes

__all__ = ["ONE", "ONE_RANK", "Parallel", "ParallelSizes", "RankGroup", "Work"]


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """On a CPU until it is done; on a GPU the current stream waits for it, the host does not."""
        ...


class _Done:
    def wait(self) -> None:
        pass


DONE = _Done()


class RankGroup:
    """Some ranks that compute together, and this one's place among them. All of them must make the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        assert 0 <= rank < size and (group is not None or size == 1)
        self.rank = rank
        self.size = size
        self.group = group

    def cut(self, dim: int, whole: int) -> Cut:
        """This rank's equal part of a dimension. `validate` of the sizes has made sure that there is one."""
        assert whole % self.size == 0
        return Cut(dim, self.rank * (whole // self.size), whole)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [...] of each rank, all of one shape -> [size, ...]"""
        out, work = self.start_all_gather(x)
        work.wait()
        return out

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Work]:
        """`all_gather` under way: the result may be read after the wait. x must stay as it is until then."""
        if self.size == 1:
            return x.unsqueeze(0), DONE
        out = x.new_empty(self.size, *x.shape)
        work = dist.all_gather_into_tensor(out.flatten(0, 1) if x.dim() else out, x.contiguous(), group=self.group, async_op=True)
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
        return cls(sizes=sizes, rank=rank, attn=attn, world=world)


ONE = Parallel.single()
