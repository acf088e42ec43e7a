"""DeepSeek's mixture of experts: a router, routed experts, and a shared expert that every token visits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.mlp import GatedMlp
from workers.model_config import MoeConfig


class Moe:
    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, moe: MoeConfig) -> None:
        self._ops = ops
        self._moe = moe
        self._gate = weights.tensor(f"{prefix}.gate.weight", moe.num_experts, hidden_size, dtype=torch.float32)
        self._bias: Tensor | None = None
        if moe.routing == "noaux_tc":
            self._bias = weights.tensor(f"{prefix}.gate.e_score_correction_bias", moe.num_experts, dtype=torch.float32)
        inner = moe.intermediate_size
        self._gate_up = torch.empty(moe.num_experts, 2 * inner, hidden_size, dtype=weights.dtype, device=weights.device)
        self._down = torch.empty(moe.num_experts, hidden_size, inner, dtype=weights.dtype, device=weights.device)
        for expert in range(moe.num_experts):
            name = f"{prefix}.experts.{expert}"
            weights.fill(self._gate_up[expert, :inner], f"{name}.gate_proj.weight")
            weights.fill(self._gate_up[expert, inner:], f"{name}.up_proj.weight")
            weights.fill(self._down[expert], f"{name}.down_proj.weight")
        self._shared: GatedMlp | None = None
        if moe.shared_intermediate_size:
            self._shared = GatedMlp(weights, f"{prefix}.shared_experts", ops, hidden_size, moe.shared_intermediate_size)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]"""
        ids, weights = self._route(x)
        out = self._ops.fused_experts(x, self._gate_up, self._down, ids, weights)
        if self._shared is not None:
            out += self._shared(x)
        return out

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T, k] and their weights [T, k] float32; always decided in float32."""
        moe = self._moe
        logits = F.linear(x.float(), self._gate)
        top_k, groups, best = moe.num_experts_per_token, moe.num_groups, moe.num_groups_per_token
        if self._bias is None:
            return self._ops.route_softmax(logits, top_k, groups, best, moe.scaling_factor)
        return self._ops.route_noaux(logits, self._bias, top_k, groups, best, moe.scaling_factor, moe.normalize_weights)
