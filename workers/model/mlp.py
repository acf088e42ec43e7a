"""The gated feed-forward block that all supported models share."""

from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.step import Step
from workers.model.summed_linear import SummedLinear
from workers.parallel import RankGroup


class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up in one product; its inner width is split over `ranks`."""

    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, intermediate_size: int, ranks: RankGroup, *,
                 has_bias: bool = False) -> None:
        def names(kind: str) -> list[str]:
            return [f"{prefix}.gate_proj.{kind}", f"{prefix}.up_proj.{kind}"]

        inner = intermediate_size // ranks.size
        split, cuts = (inner, inner), [ranks.cut(0, intermediate_size)] * 2
        gate_up = weights.linear(names("weight"), [2 * inner, hidden_size], rows=split, cuts=cuts)
        gate_up_bias = weights.stacked(names("bias"), [2 * inner], rows=split, cuts=cuts) if has_bias else None
        self._gate_up = ops.make_linear(gate_up, gate_up_bias)
        self._down = SummedLinear(weights, f"{prefix}.down_proj", ops, hidden_size, intermediate_size, ranks, has_bias=has_bias)
        self._silu_mul = ops.silu_mul

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._down(self._silu_mul(self._gate_up(x)))

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the sum."""
        return self._down.part(self._silu_mul(self._gate_up(x)))
