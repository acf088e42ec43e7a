"""Which exchange a deployment uses: the one table of them."""

from collections.abc import Callable

from torch import Tensor

from workers.model import deepep
from workers.model.exchange import ExactSent, Exchange, PaddedSent, Sent
from workers.parallel import RankGroup

Choose = Callable[[int], Exchange]  # by the rows that no rank exceeds in this step; 0: not known


def _exact(ranks: RankGroup, slots_per_rank: int, hidden_size: int) -> Choose:
    def exchange(x: Tensor, slots: Tensor, weights: Tensor) -> Sent:
        return ExactSent(ranks, slots_per_rank, x, slots, weights)

    return lambda capacity: exchange


def _padded(ranks: RankGroup, slots_per_rank: int, hidden_size: int) -> Choose:
    def choose(capacity: int) -> Exchange:
        return lambda x, slots, weights: PaddedSent(ranks, slots_per_rank, capacity, x, slots, weights)

    return choose


def _auto(ranks: RankGroup, slots_per_rank: int, hidden_size: int) -> Choose:
    exact, padded = (make(ranks, slots_per_rank, hidden_size) for make in (_exact, _padded))
    return lambda capacity: padded(capacity) if capacity else exact(0)


EXCHANGES: dict[str, Callable[[RankGroup, int, int], Choose]] = {"auto": _auto, "exact": _exact, "padded": _padded, "deepep": deepep.make}


def exchange_for(name: str, ranks: RankGroup, slots_per_rank: int, hidden_size: int) -> Choose:
    """Raises ConfigError where it cannot be had."""
    return EXCHANGES[name](ranks, slots_per_rank, hidden_size)
