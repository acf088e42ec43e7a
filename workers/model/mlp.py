"""The gated feed-forward block that all supported models share."""

from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.step import Step


class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, intermediate_size: int, *,
                 has_bias: bool = False) -> None:
        def names(kind: str) -> list[str]:
            return [f"{prefix}.gate_proj.{kind}", f"{prefix}.up_proj.{kind}"]

        split = (intermediate_size, intermediate_size)
        gate_up = weights.linear(names("weight"), [2 * intermediate_size, hidden_size], rows=split)
        gate_up_bias = weights.stacked(names("bias"), [2 * intermediate_size], rows=split) if has_bias else None
        down_bias = weights.tensor(f"{prefix}.down_proj.bias", hidden_size) if has_bias else None
        self._gate_up = ops.make_linear(gate_up, gate_up_bias)
        self._down = ops.make_linear(weights.linear([f"{prefix}.down_proj.weight"], [hidden_size, intermediate_size]), down_bias)
        self._silu_mul = ops.silu_mul

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, D] -> [T, D]"""
        return self._down(self._silu_mul(self._gate_up(x)))
