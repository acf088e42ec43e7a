"""A matrix product whose inner dimension is split over ranks: each computes a part of the sum, then all have the sum."""

from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.parallel import RankGroup


class SummedLinear:
    """x [T, columns / ranks], a rank's own columns -> [T, rows]"""

    def __init__(self, weights: Checkpoint, name: str, ops: Ops, rows: int, columns: int, ranks: RankGroup, *,
                 has_bias: bool = False) -> None:
        weight = weights.linear([f"{name}.weight"], [rows, columns // ranks.size], cuts=[ranks.cut(1, columns)])
        bias: Tensor | None = None
        if has_bias and ranks.rank == 0:  # it must be added once
            bias = weights.tensor(f"{name}.bias", rows)
        elif has_bias:
            weights.leave(f"{name}.bias")
        self.part = ops.make_linear(weight, bias)
        self._ranks = ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self._ranks.all_reduce(self.part(x))
