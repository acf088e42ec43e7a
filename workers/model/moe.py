"""DeepSeek's mixture of experts: a router, routed experts, and a shared expert that every token visits.

A shared expert is as wide as several routed ones and, cut into that many, is their sum: where the device's experts take shared
ones along, it is computed as further experts of the same products.
"""

import torch
from torch import Tensor

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
        is_fused = ops.has_shared_experts and not rest
        self._routing = Routing(
            top_k=moe.num_experts_per_token, num_groups=moe.num_groups, groups_per_token=moe.num_groups_per_token,
            scaling_factor=moe.scaling_factor, normalize=moe.normalize_weights, bias=_bias(weights, prefix, moe),
            num_shared=num_shared if is_fused else 0)
        self._experts = ops.make_experts(*_stacked_experts(weights, prefix, hidden_size, moe, self._routing.num_shared))
        self._shared: GatedMlp | None = None
        if moe.shared_intermediate_size and not is_fused:
            self._shared = GatedMlp(weights, f"{prefix}.shared_experts", ops, hidden_size, moe.shared_intermediate_size)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, D] -> [T, D], or [T, k, D] to be summed over k"""
        ids, weights = self._route(self._router(x), self._routing, step.num_valid)
        out = self._experts(x, ids, weights)
        if self._shared is not None:
            out += self._shared(x, step)
        return out


def _bias(weights: Checkpoint, prefix: str, moe: MoeConfig) -> Tensor | None:
    if moe.routing != "noaux_tc":
        return None
    return weights.tensor(f"{prefix}.gate.e_score_correction_bias", moe.num_experts, dtype=torch.float32)


def _stacked_experts(weights: Checkpoint, prefix: str, hidden_size: int, moe: MoeConfig, num_shared: int) -> tuple[Tensor, Tensor]:
    """gate_up [E + shared, 2I, D] and down [E + shared, D, I]"""
    inner, num_experts = moe.intermediate_size, moe.num_experts
    gate_up = torch.empty(num_experts + num_shared, 2 * inner, hidden_size, dtype=weights.dtype, device=weights.device)
    down = torch.empty(num_experts + num_shared, hidden_size, inner, dtype=weights.dtype, device=weights.device)
    for expert in range(num_experts):
        name = f"{prefix}.experts.{expert}"
        weights.fill(gate_up[expert, :inner], f"{name}.gate_proj.weight")
        weights.fill(gate_up[expert, inner:], f"{name}.up_proj.weight")
        weights.fill(down[expert], f"{name}.down_proj.weight")
    if num_shared:
        name, width = f"{prefix}.shared_experts", num_shared * inner
        gate_up[num_experts:, :inner] = weights.tensor(f"{name}.gate_proj.weight", width, hidden_size).view(num_shared, inner, hidden_size)
        gate_up[num_experts:, inner:] = weights.tensor(f"{name}.up_proj.weight", width, hidden_size).view(num_shared, inner, hidden_size)
        by_column = weights.tensor(f"{name}.down_proj.weight", hidden_size, width).view(hidden_size, num_shared, inner)
        down[num_experts:] = by_column.transpose(0, 1)
    return gate_up, down
