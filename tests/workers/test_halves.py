"""A batch in two halves computes what the batch computes; passes in turns alternate."""

from collections.abc import Generator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.batch import ForwardBatch
from workers.halves import halves
from workers.model.turns import run, run_both

PAGE_SIZE = 4


def make_batch(lens: list[tuple[int, int]]) -> ForwardBatch:
    """One sequence per (tokens before, new tokens), each with pages of its own; the last new token of each is sampled."""
    batch = ForwardBatch([], [], [], [], [], [], [])
    for i, (before, new) in enumerate(lens):
        pages = list(range(100 * i, 100 * i + 30))
        places = range(before, before + new)
        batch.token_ids += [1000 * i + place for place in places]
        batch.positions += places
        batch.slot_mapping += [pages[place // PAGE_SIZE] * PAGE_SIZE + place % PAGE_SIZE for place in places]
        batch.query_lens.append(new)
        batch.seq_lens.append(before + new)
        batch.page_tables.append(pages)
        batch.logit_rows.append(len(batch.token_ids) - 1)
        batch.carried.append(-1)
    return batch


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=5), st.integers(0, 50))
def test_halves_hold_every_row_once_and_end_where_their_tokens_end(lens: list[tuple[int, int]], middle: int) -> None:
    batch = make_batch(lens)
    first, second = halves(batch, middle)
    assert first.token_ids + second.token_ids == batch.token_ids
    assert first.slot_mapping + second.slot_mapping == batch.slot_mapping
    assert len(first.token_ids) == min(middle, len(batch.token_ids))
    assert first.logit_rows + [row + len(first.token_ids) for row in second.logit_rows] == batch.logit_rows
    for half in (first, second):
        assert sum(half.query_lens) == len(half.token_ids)
        at = 0
        for count, end, pages in zip(half.query_lens, half.seq_lens, half.page_tables, strict=True):
            assert half.positions[at : at + count] == list(range(end - count, end))
            assert half.slot_mapping[at] == pages[(end - count) // PAGE_SIZE] * PAGE_SIZE + (end - count) % PAGE_SIZE
            at += count


def passing(name: str, seen: list[str], num_pauses: int = 3) -> Generator[None, None, torch.Tensor]:
    for i in range(num_pauses):
        seen.append(f"{name}{i}")
        yield
    seen.append(f"{name} ends")
    return torch.tensor(len(seen))


def test_two_passes_alternate_and_the_first_stays_ahead() -> None:
    seen: list[str] = []
    run_both(passing("a", seen), passing("b", seen))
    assert seen == ["a0", "b0", "a1", "b1", "a2", "b2", "a ends", "b ends"]


@pytest.mark.parametrize("num_pauses", [0, 2])
def test_a_pass_runs_straight_on(num_pauses: int) -> None:
    seen: list[str] = []
    assert int(run(passing("a", seen, num_pauses))) == num_pauses + 1
