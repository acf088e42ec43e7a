"""Every expert has a place, no rank has more than its slots, and the busy ones are shared."""

from hypothesis import given
from hypothesis import strategies as st

from workers.expert_placement import busiest, even, moves, place_experts, replace_experts


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int]:
    num_ranks = draw(st.integers(1, 8))
    own = draw(st.integers(1, 6))
    num_experts = num_ranks * own
    redundant = draw(st.integers(0, min(3, num_experts - own)))
    load = draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    return [float(each) for each in load], num_ranks, num_ranks * (own + redundant)


def by_rank(placement: tuple[int, ...], num_ranks: int) -> list[list[int]]:
    per_rank = len(placement) // num_ranks
    return [list(placement[rank * per_rank : (rank + 1) * per_rank]) for rank in range(num_ranks)]


@given(cases())
def test_every_expert_has_a_slot_and_every_slot_an_expert(case: tuple[list[float], int, int]) -> None:
    load, num_ranks, num_slots = case
    for placement in (place_experts(load, num_ranks, num_slots), even(len(load), num_ranks, num_slots)):
        assert len(placement) == num_slots and set(placement) == set(range(len(load)))
        assert all(placement.count(expert) <= num_ranks for expert in range(len(load)))


@given(cases())
def test_the_busiest_rank_has_at_most_the_average_and_one_share_more(case: tuple[list[float], int, int]) -> None:
    load, num_ranks, num_slots = case
    placement = place_experts(load, num_ranks, num_slots)
    shares = [load[expert] / placement.count(expert) for expert in placement]
    per_rank = num_slots // num_ranks
    # A rank is only given a share while it has less than another with room; full ranks are those that took the largest.
    assert busiest(placement, load, num_ranks) <= sum(load) / num_ranks + per_rank * max(shares) + 1e-6


@given(cases())
def test_a_known_load_never_makes_the_busiest_rank_busier(case: tuple[list[float], int, int]) -> None:
    load, num_ranks, num_slots = case
    old = even(len(load), num_ranks, num_slots)
    new = replace_experts(old, load, num_ranks)
    assert set(new) == set(range(len(load)))
    assert busiest(new, load, num_ranks) <= busiest(old, load, num_ranks) + 1e-9


@given(cases())
def test_moves_lead_from_the_old_placement_to_the_new_one(case: tuple[list[float], int, int]) -> None:
    load, num_ranks, num_slots = case
    old = even(len(load), num_ranks, num_slots)
    new = replace_experts(old, load, num_ranks)
    after = list(old)
    for source, slot in moves(old, new, num_ranks):
        after[slot] = old[source]
    assert tuple(after) == new


def test_hot_experts_are_copied_and_spread() -> None:
    load = [100.0, 1.0, 1.0, 1.0, 60.0, 1.0, 1.0, 1.0]
    placement = place_experts(load, 4, 12)
    assert placement.count(0) == 4 and placement.count(4) >= 2
    assert busiest(placement, load, 4) < 0.6 * busiest(even(8, 4, 8), load, 4)
    assert all(len(set(experts)) == len(experts) for experts in by_rank(placement, 4))


def test_an_even_load_moves_nothing() -> None:
    assert replace_experts(even(16, 4, 16), [5.0] * 16, 4) == even(16, 4, 16)


def test_what_a_rank_keeps_stays_in_its_slot() -> None:
    load = [50.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 60.0]
    old = even(8, 2, 10)
    new = replace_experts(old, load, 2)
    for before, after in zip(by_rank(old, 2), by_rank(new, 2), strict=True):
        assert all(after[slot] == expert for slot, expert in enumerate(before) if expert in after and before.count(expert) == 1)
