"""Moves experts to where the load asks for them, between steps: every layer's placement from the load that its ranks have seen.

All ranks run the same steps, so they count to the same step and decide the same from the same summed loads: nothing is negotiated.
"""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from workers.expert_placement import Placement, busiest, moves, replace_experts
from workers.model.spread_moe import SpreadMoe
from workers.parallel import RankGroup

log = logging.getLogger(__name__)


class ExpertBalancer:
    """`layers`: those with experts that are spread, in the same order on all ranks; `period` in steps, 0: never.

    Each layer has its turn once in a period, one after the other: no step waits for the weights of all.
    """

    def __init__(self, layers: Sequence[SpreadMoe], ranks: RankGroup, period: int) -> None:
        self._layers = layers
        self._ranks = ranks
        self._period = period
        self._num_steps = 0
        self.num_moved = 0  # expert slots that have changed, over all layers and ranks

    def start(self) -> None:
        """What was run so far only warmed up: its loads mean nothing."""
        self._num_steps = 0
        for layer in self._layers:
            if layer.load is not None:
                layer.load.zero_()

    def after_step(self) -> None:
        """Called by all ranks between the same two steps. Waits for the device where a layer has its turn."""
        self._num_steps += 1
        if not self._period or self._num_steps < self._period:
            return
        for layer in self._layers[self._num_steps % self._period :: self._period]:
            self._rebalance(layer)

    def _rebalance(self, layer: SpreadMoe) -> None:
        assert layer.load is not None
        load = self._ranks.all_reduce(layer.load).tolist()
        layer.load.zero_()
        before = layer.placement
        num_moved = self._move(layer, replace_experts(before, load, self._ranks.size))
        self.num_moved += num_moved
        if num_moved:
            share = self._ranks.size / sum(load)
            was, now = (busiest(placement, load, self._ranks.size) * share for placement in (before, layer.placement))
            log.info("%d expert slots changed: the busiest rank has %.2f times the average load, it had %.2f", num_moved, now, was)

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
