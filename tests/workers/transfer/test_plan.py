"""The plan of a hand-over between groups of ranks: every cell of the target is written exactly once, from a rank that holds it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import LayoutMismatch
from workers.transfer.plan import Part, heads_of, plan

SIZES = [1, 2, 4, 8, 16]


def even(num_heads: int, tp_size: int) -> bool:
    return num_heads % tp_size == 0 or tp_size % num_heads == 0


CASES = [case for case in itertools.product([1, 2, 3, 4, 6, 8], [1, 2, 3, 4, 6, 8, 16], [1, 2, 3, 4, 6, 8, 16])
         if even(case[0], case[1]) and even(case[0], case[2])]


@given(st.sampled_from(CASES), st.integers(0, 40))
def test_every_cell_of_every_target_rank_is_written_once_and_from_where_it_is(case: tuple[int, int, int], num_pages: int) -> None:
    num_heads, source_tp, target_tp = case
    for target_rank in range(target_tp):
        wanted = heads_of(num_heads, target_tp, target_rank)
        written: list[tuple[int, int]] = []
        for part in plan(num_heads, source_tp, target_tp, target_rank):
            held = heads_of(num_heads, source_tp, part.source_rank)
            for i, page in itertools.product(range(part.num_heads), part.positions(num_pages)):
                assert held[part.source_head + i] == wanted[part.target_head + i]
                written.append((part.target_head + i, page))
        assert sorted(written) == list(itertools.product(range(len(wanted)), range(num_pages)))


@given(st.sampled_from(SIZES), st.sampled_from(SIZES))
def test_each_source_rank_sends_its_share_of_a_latent_to_each_target_rank(source_tp: int, target_tp: int) -> None:
    for target_rank in range(target_tp):
        parts = plan(1, source_tp, target_tp, target_rank)
        assert [part.source_rank for part in parts] == list(range(source_tp))
        sizes = [len(part.positions(100)) for part in parts]
        assert sum(sizes) == 100 and max(sizes) - min(sizes) <= 1


def test_heads_are_sliced_anew() -> None:
    assert plan(8, 2, 4, 1) == (Part(source_rank=0, source_head=2, target_head=0, num_heads=2, share=0, num_shares=1),)
    assert [(part.source_rank, part.target_head) for part in plan(8, 4, 2, 1)] == [(2, 0), (3, 2)]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="3 KV heads"):
        plan(3, 2, 1, 0)
