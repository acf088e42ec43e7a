"""DeepSeek's mixture of experts: a router, routed experts, and a shared expert that every token visits.

A shared expert is as wide as several routed ones and, cut into that many, is their sum: where the device's experts take shared
ones along, it is computed as further experts of the same products.
"""

import torch
from torch import Tensor

from kernels.block_fp8 import BlockFp8
from kernels.ops import Ops, Routing
from workers.loader import Checkpoint
from workers.model.mlp import GatedMlp
from workers.model.step import Step
from workers.model_config import MoeConfig


class Moe:
    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, moe: MoeConfig) -> None:
        self._route = ops.route
        self._router = ops.make_router(weights.tensor(f"{prefix}.gate.weight", moe.num_experts, hidden_size, dtype=torch.float32))
        num_shared, rest = divmod(moe.shared_intermediate_size, moe.intermediate_size)
        is_fused = ops.has_shared_experts and not rest and (num_shared == 1 or not weights.keeps_fp8)
        num_fused = num_shared if is_fused else 0
        experts = ops.make_experts(*_stacked_experts(weights, prefix, hidden_size, moe, num_fused))
        self._experts = experts.run
        self._routing = Routing(
            top_k=moe.num_experts_per_token, num_groups=moe.num_groups, groups_per_token=moe.num_groups_per_token,
            scaling_factor=moe.scaling_factor, normalize=moe.normalize_weights, bias=_bias(weights, prefix, moe),
            num_shared=num_fused, block_m=experts.block_m)
        self._shared: GatedMlp | None = None
        if moe.shared_intermediate_size and not is_fused:
            self._shared = GatedMlp(weights, f"{prefix}.shared_experts", ops, hidden_size, moe.shared_intermediate_size)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, D] -> [T, D], or [T, k, D] to be summed over k"""
        out = self._experts(x, self._route(self._router(x), self._routing, step.num_valid))
        if self._shared is not None:
            out += self._shared(x, step)
        return out


def _bias(weights: Checkpoint, prefix: str, moe: MoeConfig) -> Tensor | None:
    if moe.routing != "noaux_tc":
        return None
    return weights.tensor(f"{prefix}.gate.e_score_correction_bias", moe.num_experts, dtype=torch.float32)


def _stacked_experts(weights: Checkpoint, prefix: str, hidden_size: int, moe: MoeConfig,
                     num_shared: int) -> tuple[Tensor | BlockFp8, Tensor | BlockFp8]:
    """gate_up [E + shared, 2I, D] and down [E + shared, D, I]"""
    inner = moe.intermediate_size
    names = [f"{prefix}.experts.{expert}" for expert in range(moe.num_experts)]
    if num_shared == 1:
        names.append(f"{prefix}.shared_experts")
    gate_up = weights.linears([[f"{name}.gate_proj.weight", f"{name}.up_proj.weight"] for name in names],
                              [len(names), 2 * inner, hidden_size], rows=(inner, inner))
    down = weights.linears([[f"{name}.down_proj.weight"] for name in names], [len(names), hidden_size, inner])
    if num_shared > 1:
        shared = _cut_shared(weights, f"{prefix}.shared_experts", hidden_size, inner, num_shared)
        gate_up, down = (torch.cat((_plain(weight, part.dtype), part)) for weight, part in zip((gate_up, down), shared, strict=True))
    return gate_up, down


def _cut_shared(weights: Checkpoint, name: str, hidden_size: int, inner: int, count: int) -> tuple[Tensor, Tensor]:
    """A shared expert of width count * inner as `count` experts whose outputs add up to its: [count, 2I, D] and [count, D, I]"""
    width = count * inner
    gate, up = (weights.tensor(f"{name}.{part}_proj.weight", width, hidden_size).view(count, inner, hidden_size) for part in ("gate", "up"))
    down = weights.tensor(f"{name}.down_proj.weight", hidden_size, width).view(hidden_size, count, inner)
    return torch.cat((gate, up), 1), down.transpose(0, 1)


def _plain(weight: Tensor | BlockFp8, dtype: torch.dtype) -> Tensor:
    return weight.dequantized(dtype) if isinstance(weight, BlockFp8) else weight
