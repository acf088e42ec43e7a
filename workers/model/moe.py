"""DeepSeek's mixture of experts: a router, routed experts, and a shared expert that every token visits.

Each expert's inner width is split over the ranks of a dp group, the shared one's too: one sum over ranks ends the block. (Whole
experts spread over ranks: `spread_moe`.)

A shared expert is as wide as several routed ones and, cut into that many, is their sum: where the device's experts take shared
ones along, it is computed as further experts of the same products.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.block_fp8 import BlockFp8
from kernels.ops import Ops, Routing
from workers.loader import Checkpoint
from workers.model.mlp import GatedMlp
from workers.model.step import Step
from workers.model_config import MoeConfig
from workers.parallel import RankGroup


class Moe:
    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, moe: MoeConfig, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._route = ops.route
        self._router = ops.make_router(weights.tensor(f"{prefix}.gate.weight", moe.num_experts, hidden_size, dtype=torch.float32))
        num_shared, rest = divmod(moe.shared_intermediate_size, moe.intermediate_size)
        is_fused = ops.has_shared_experts and not rest and (num_shared == 1 or not weights.keeps_fp8)
        num_fused = num_shared if is_fused else 0
        experts = ops.make_experts(*_stacked_experts(weights, prefix, hidden_size, moe, num_fused, ranks))
        self._experts = experts.run
        self._routing = routing(weights, prefix, moe, num_shared=num_fused, block_m=experts.block_m)
        self._shared: GatedMlp | None = None
        if moe.shared_intermediate_size and not is_fused:
            self._shared = GatedMlp(weights, f"{prefix}.shared_experts", ops, hidden_size, moe.shared_intermediate_size, ranks)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """[T, D] -> [T, D], or [T, k, D] to be summed over k"""
        out = self._experts(x, self._route(self._router(x), self._routing, step.num_valid))
        if self._ranks.size > 1 and out.dim() == 3:
            out = out.sum(1)
        if self._shared is not None:
            out += self._shared.part(x)
        return self._ranks.all_reduce(out)


def routing(weights: Checkpoint, prefix: str, moe: MoeConfig, *, num_shared: int = 0,
            block_m: Callable[[int, int], int] | None = None) -> Routing:
    bias: Tensor | None = None
    if moe.routing == "noaux_tc":
        bias = weights.tensor(f"{prefix}.gate.e_score_correction_bias", moe.num_experts, dtype=torch.float32)
    return Routing(top_k=moe.num_experts_per_token, num_groups=moe.num_groups, groups_per_token=moe.num_groups_per_token,
                   scaling_factor=moe.scaling_factor, normalize=moe.normalize_weights, bias=bias, num_shared=num_shared, block_m=block_m)


def _stacked_experts(weights: Checkpoint, prefix: str, hidden_size: int, moe: MoeConfig, num_shared: int,
                     ranks: RankGroup) -> tuple[Tensor | BlockFp8, Tensor | BlockFp8]:
    """gate_up [E + shared, 2I, D] and down [E + shared, D, I], I a rank's part of the inner width"""
    names = [f"{prefix}.experts.{expert}" for expert in range(moe.num_experts)]
    if num_shared == 1:
        names.append(f"{prefix}.shared_experts")
    gate_up, down = stacked(weights, names, hidden_size, moe.intermediate_size, ranks)
    if num_shared > 1:
        shared = _cut_shared(weights, f"{prefix}.shared_experts", hidden_size, moe.intermediate_size, num_shared, ranks)
        gate_up, down = (torch.cat((_plain(weight, part.dtype), part)) for weight, part in zip((gate_up, down), shared, strict=True))
    return gate_up, down


def stacked(weights: Checkpoint, names: list[str], hidden_size: int, width: int,
            ranks: RankGroup) -> tuple[Tensor | BlockFp8, Tensor | BlockFp8]:
    """The experts `names` as one: gate_up [E, 2I, D] and down [E, D, I], I a rank's part of `width`"""
    inner = width // ranks.size
    gate_up = weights.linears([[f"{name}.gate_proj.weight", f"{name}.up_proj.weight"] for name in names],
                              [len(names), 2 * inner, hidden_size], rows=(inner, inner), cuts=[ranks.cut(0, width)] * 2)
    down = weights.linears([[f"{name}.down_proj.weight"] for name in names], [len(names), hidden_size, inner], cuts=[ranks.cut(1, width)])
    return gate_up, down


def _cut_shared(weights: Checkpoint, name: str, hidden_size: int, inner: int, count: int, ranks: RankGroup) -> tuple[Tensor, Tensor]:
    """A shared expert of width count * inner as `count` experts whose outputs add up to its: [count, 2I, D] and [count, D, I]"""
    width, part = count * inner, count * inner // ranks.size
    gate, up = (weights.tensor(f"{name}.{kind}_proj.weight", part, hidden_size, cut=ranks.cut(0, width)).view(count, -1, hidden_size)
                for kind in ("gate", "up"))
    down = weights.tensor(f"{name}.down_proj.weight", hidden_size, part, cut=ranks.cut(1, width)).view(hidden_size, count, -1)
    return torch.cat((gate, up), 1), down.transpose(0, 1)


def _plain(weight: Tensor | BlockFp8, dtype: torch.dtype) -> Tensor:
    return weight.dequantized(dtype) if isinstance(weight, BlockFp8) else weight
