"""Which rank keeps which experts, and how many copies of each. Knows loads and slots; no tensor, no process.

Slots are numbered over all ranks: those of rank r are [r * S, (r + 1) * S). Every expert has at least one; the further slots go to
the experts most in demand, and each copy then takes its share of the expert's tokens.
"""

import heapq
from collections.abc import Sequence

Placement = tuple[int, ...]  # the expert in each slot
WORTH_MOVING = 0.95          # of the busiest rank's load: below it, weights are moved


def even(num_experts: int, num_ranks: int, num_slots: int) -> Placement:
    """In order, as long as no load is known; further slots hold the experts that follow a rank's own."""
    own, per_rank = num_experts // num_ranks, num_slots // num_ranks
    return tuple((rank * own + i) % num_experts for rank in range(num_ranks) for i in range(per_rank))


def place_experts(load: Sequence[float], num_ranks: int, num_slots: int) -> Placement:
    """Slots such that the busiest rank has little: copies for the largest shares, then the largest first to the least busy rank.

    load       tokens of each expert, in any unit
    num_slots  a multiple of num_ranks, at least one per expert and at most one per expert and rank

    The same arguments give the same placement. Source: after DeepSeek's EPLB, without its levels of nodes.
    """
    num_experts, per_rank = len(load), num_slots // num_ranks
    assert num_slots == per_rank * num_ranks and num_experts <= num_slots and per_rank <= num_experts
    copies = _count_copies(load, num_ranks, num_slots)
    shares = sorted((-load[expert] / count, expert) for expert, count in enumerate(copies) for _ in range(count))
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for negative, expert in shares:
        free = [rank for rank in range(num_ranks) if len(ranks[rank]) < per_rank]
        fresh = [rank for rank in free if expert not in ranks[rank]] or free
        rank = min(fresh, key=lambda rank: (totals[rank], rank))
        ranks[rank].append(expert)
        totals[rank] -= negative
    return tuple(expert for experts in ranks for expert in experts)


def _count_copies(load: Sequence[float], num_ranks: int, num_slots: int) -> list[int]:
    copies = [1] * len(load)
    largest = [(-each, expert) for expert, each in enumerate(load)]
    heapq.heapify(largest)
    for _ in range(num_slots - len(load)):
        _, expert = heapq.heappop(largest)
        copies[expert] += 1
        if copies[expert] < num_ranks:
            heapq.heappush(largest, (-load[expert] / copies[expert], expert))
    return copies


def busiest(placement: Placement, load: Sequence[float], num_ranks: int) -> float:
    """The load of the rank that has most of it, an expert's tokens shared evenly by its copies."""
    per_rank = len(placement) // num_ranks
    copies = [0] * len(load)
    for expert in placement:
        copies[expert] += 1
    return max(sum(load[e] / copies[e] for e in placement[rank * per_rank : (rank + 1) * per_rank]) for rank in range(num_ranks))


def replace_experts(old: Placement, load: Sequence[float], num_ranks: int) -> Placement:
    """The placement for an observed load: `old` itself unless another takes enough from the busiest rank, and near it otherwise."""
    new = place_experts(load, num_ranks, len(old))
    if busiest(new, load, num_ranks) >= WORTH_MOVING * busiest(old, load, num_ranks):
        return old
    per_rank = len(old) // num_ranks
    settled: list[int] = []
    for start in range(0, len(old), per_rank):
        settled += _stay_put(old[start : start + per_rank], new[start : start + per_rank])
    return tuple(settled)


def _stay_put(old: Placement, new: Placement) -> list[int]:
    """A rank's new experts in such an order that those it has already keep their slots."""
    arriving = list(new)
    kept = []
    for expert in old:
        kept.append(expert if expert in arriving else None)
        if expert in arriving:
            arriving.remove(expert)
    return [arriving.pop(0) if expert is None else expert for expert in kept]


def moves(old: Placement, new: Placement, num_ranks: int) -> list[tuple[int, int]]:
    """(from slot, to slot) for every slot whose expert changes: from the same rank where it has a copy, else from a holder in turn."""
    per_rank = len(old) // num_ranks
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, []).append(slot)
    found = []
    for slot, (before, expert) in enumerate(zip(old, new, strict=True)):
        if before != expert:
            near = [holder for holder in holders[expert] if holder // per_rank == slot // per_rank]
            found.append((near[0] if near else holders[expert][slot % len(holders[expert])], slot))
    return found
