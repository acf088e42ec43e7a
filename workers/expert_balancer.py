"""Moves experts to where the load asks for them, between steps: every layer's placement from the load that its ranks have seen.

All ranks run the same steps, so they count to the same step and decide the same from the same summed loads: nothing is negotiated.
"""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from workers.expert_placement import Placement, moves, replace_experts
from workers.model.spread_moe import SpreadMoe
from workers.parallel import RankGroup

log = logging.getLogger(__name__)


class ExpertBalancer:
    """`layers`: those with experts that are spread, in the same order on all ranks; `period` in steps, 0: never."""

    def __init__(self, layers: Sequence[SpreadMoe], ranks: RankGroup, period: int) -> None:
        self._layers = layers
        self._ranks = ranks
        self._period = period if layers else 0
        self._num_steps = 0

    def after_step(self) -> None:
        self._num_steps += 1
        if self._period and self._num_steps % self._period == 0:
            self.rebalance()

    def rebalance(self) -> int:
        """How many experts were moved, over all layers. Waits for the device. Called by all ranks between the same two steps."""
        loads = torch.stack([layer.load for layer in self._layers if layer.load is not None])
        num_moved = 0
        for layer, load in zip(self._layers, self._ranks.all_reduce(loads).tolist(), strict=True):
            placement = replace_experts(layer.placement, load, self._ranks.size)
            num_moved += self._move(layer, placement)
            assert layer.load is not None
            layer.load.zero_()
        log.info("rebalanced %d layers: %d expert slots changed", len(self._layers), num_moved)
        return num_moved

    def _move(self, layer: SpreadMoe, placement: Placement) -> int:
        """Weights first, then the table. A slot that is overwritten may still be a source: arrivals wait beside until all are sent."""
        wanted = moves(layer.placement, placement, self._ranks.size)
        arrivals: dict[int, list[Tensor]] = {}
        transfers: list[dist.P2POp] = []
        for source, slot in wanted:
            (giver, at), (taker, to) = (divmod(each, layer.slots_per_rank) for each in (source, slot))
            if taker == self._ranks.rank:
                arrivals[to] = [weight[at].clone() if giver == taker else torch.empty_like(weight[to]) for weight in layer.experts.weights]
            if giver == taker:
                continue
            if giver == self._ranks.rank:
                transfers += [self._transfer(dist.isend, weight[at], taker) for weight in layer.experts.weights]
            elif taker == self._ranks.rank:
                transfers += [self._transfer(dist.irecv, weight, giver) for weight in arrivals[to]]
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        for to, arrived in arrivals.items():
            for weight, new in zip(layer.experts.weights, arrived, strict=True):
                _bytes(weight[to]).copy_(_bytes(new))
        layer.show(placement)
        return len(wanted)

    def _transfer(self, op: object, weight: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, _bytes(weight), group=self._ranks.group, group_peer=peer)  # type: ignore[arg-type]


def _bytes(weight: Tensor) -> Tensor:
    """Collectives and copies know no fp8."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
