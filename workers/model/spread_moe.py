"""A mixture of experts whose experts are spread over all ranks, whole: tokens travel to them (MOE_MODE=EP).

Each rank of a dp group takes an equal share of the group's tokens, and has the shared expert whole: it needs no travel, and is
computed while the routed tokens are under way. A router numbers experts; a table turns them into slots, a copied expert's slots in
turn. Tables, loads and weights stay where they are in memory, so that a captured CUDA graph sees experts move.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Ops, Routed
from workers.expert_placement import Placement, even
from workers.loader import Checkpoint
from workers.model.exchange import Arrived
from workers.model.exchanges import exchange_for
from workers.model.mlp import GatedMlp
from workers.model.moe import routing, stacked
from workers.model.step import Step
from workers.model.turns import Steps
from workers.model_config import MoeConfig
from workers.parallel import Parallel, RankGroup

ALONE = RankGroup()
MAX_ROWS = 16384  # arrived rows computed at once: bounds the memory for their copies, one per expert


class SpreadMoe:
    """`load`: tokens that chose each expert, on this rank, since it was last set to zero; None where nobody asks."""

    def __init__(self, weights: Checkpoint, prefix: str, ops: Ops, hidden_size: int, moe: MoeConfig, parallel: Parallel) -> None:
        self._world, self._group, sizes = parallel.world, parallel.attn, parallel.sizes
        self._route = ops.route
        self._router = ops.make_router(weights.tensor(f"{prefix}.gate.weight", moe.num_experts, hidden_size, dtype=torch.float32))
        self._routing = routing(weights, prefix, moe)
        self.slots_per_rank = moe.num_experts // self._world.size + sizes.redundant_experts
        self.placement = even(moe.num_experts, self._world.size, self._world.size * self.slots_per_rank)
        first = self._world.rank * self.slots_per_rank
        own = self.placement[first : first + self.slots_per_rank]
        self.experts = ops.make_experts(*stacked(weights, [f"{prefix}.experts.{expert}" for expert in own], hidden_size,
                                                 moe.intermediate_size, ALONE))
        for expert in set(range(moe.num_experts)) - set(own):
            weights.leave(f"{prefix}.experts.{expert}.")
        self._shared: GatedMlp | None = None
        if moe.shared_intermediate_size:
            self._shared = GatedMlp(weights, f"{prefix}.shared_experts", ops, hidden_size, moe.shared_intermediate_size, ALONE)
        self._exchange_for = exchange_for(sizes.exchange, parallel.world, self.slots_per_rank, hidden_size)
        most_copies = min(self._world.size, 1 + self._world.size * sizes.redundant_experts)
        self._slots = torch.zeros(moe.num_experts, most_copies, dtype=torch.int32, device=weights.device)
        self._num_copies = torch.ones(moe.num_experts, dtype=torch.int64, device=weights.device)
        self.load = torch.zeros(moe.num_experts, dtype=torch.int64, device=weights.device) if sizes.rebalance_steps else None
        self.show(self.placement)

    def show(self, placement: Placement) -> None:
        """From the next step on, this is where experts are. Their weights must be there."""
        slots: list[list[int]] = [[] for _ in range(self._slots.shape[0])]
        for slot, expert in enumerate(placement):
            slots[expert].append(slot)
        width = self._slots.shape[1]
        self._slots.copy_(torch.tensor([(each * width)[:width] for each in slots], dtype=torch.int32))
        self._num_copies.copy_(torch.tensor([min(len(each), width) for each in slots]))
        self.placement = placement

    def steps(self, x: Tensor, step: Step) -> Steps:
        """[T, D] -> [T, D]; pauses while tokens are under way."""
        share, num_real = self._own_share(x)
        routed = self._choose(share, num_real, step)
        per_share = -(-step.capacity // self._group.size)
        sent = self._exchange_for(per_share)(share, self._to_slots(routed.ids), routed.weights)
        shared = self._shared(share, step) if self._shared is not None else None
        yield
        sent.send_back(self._compute(sent.arrived()))
        yield
        out = sent.returned()
        if shared is not None:
            out += shared
        if self._group.size == 1:
            return out
        return self._group.all_gather(out).flatten(0, 1)[: x.shape[0]]

    def _own_share(self, x: Tensor) -> tuple[Tensor, int]:
        """This rank's rows of the dp group's, the last ones padded, and how many of them are real."""
        if self._group.size == 1:
            return x, x.shape[0]
        count = -(-x.shape[0] // self._group.size)
        first = min(self._group.rank * count, x.shape[0])
        share = x[first : first + count]
        return F.pad(share, (0, 0, 0, count - share.shape[0])), share.shape[0]

    def _choose(self, x: Tensor, num_real: int, step: Step) -> Routed:
        num_valid = step.num_valid
        if num_valid is not None and self._group.size > 1:
            num_valid = (num_valid - self._group.rank * x.shape[0]).clamp(0, x.shape[0])
        routed = self._route(self._router(x), self._routing, num_valid)
        if num_real < x.shape[0]:
            routed.ids[num_real:] = -1
        if self.load is not None:
            chosen = routed.ids.flatten().long()
            self.load.index_add_(0, chosen.clamp(min=0), (chosen >= 0).long())
        return routed

    def _to_slots(self, ids: Tensor) -> Tensor:
        """Experts [T, k] -> slots [T, k] int32; copies are used in turn from row to row, and ranks begin with different ones."""
        experts = ids.long().clamp(min=0)
        turns = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) + self._world.rank
        slots = self._slots[experts, turns % self._num_copies[experts]]
        return torch.where(ids < 0, -1, slots)

    def _compute(self, arrived: Arrived) -> Tensor:
        """[M, D]: this rank's experts' part of each row."""
        if not arrived.is_sparse:
            out = self.experts.run(arrived.x, Routed(arrived.slots, arrived.weights))
            return out if out.dim() == 2 else out.sum(1)
        parts = zip(*(tensor.split(MAX_ROWS) for tensor in (arrived.x, arrived.slots, arrived.weights)), strict=True)
        return torch.cat([self._compute_sparse(*part) for part in parts])

    def _compute_sparse(self, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """With one row per token and expert that is here: most of a token's choices are on other ranks."""
        choice_ids, token_ids = (slots.t() >= 0).nonzero().unbind(1)
        chosen = Routed(slots[token_ids, choice_ids].unsqueeze(1), weights[token_ids, choice_ids].unsqueeze(1))
        made = self.experts.run(x[token_ids], chosen).flatten(1)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        counts = choice_ids.bincount(minlength=slots.shape[1]).tolist()
        for rows, of_choice in zip(token_ids.split(counts), made.split(counts), strict=True):
            out.index_add_(0, rows, of_choice.float())  # choice by choice, so that sums have one order
        return out.to(x.dtype)


