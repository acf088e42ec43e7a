"""The page allocator: counts, contiguity, pins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import PagesExhausted
from workers.page_pool import PagePool


def test_a_sequence_grows_into_the_page_right_after_its_last_one() -> None:
    pool = PagePool(100)
    first = pool.allocate(3, expected=10)
    second = pool.allocate(3, expected=10)
    for pages in (first, second):
        for _ in range(7):
            pages += pool.allocate(1, after=pages[-1])
    assert first == list(range(first[0], first[0] + 10))
    assert second == list(range(second[0], second[0] + 10))


def test_a_new_sequence_starts_in_the_largest_free_run() -> None:
    pool = PagePool(30)
    pages = pool.allocate(30)
    pool.release(pages[2:5])
    pool.release(pages[10:20])
    assert pool.allocate(2, expected=4) == [16, 17]


def test_a_sequence_larger_than_any_free_run_takes_the_largest_ones() -> None:
    pool = PagePool(10)
    pages = pool.allocate(10)
    pool.release(pages[0:2])
    pool.release(pages[4:8])
    assert pool.allocate(5, expected=5) == [4, 5, 6, 7, 1]


def test_released_pages_join_their_free_neighbours() -> None:
    pool = PagePool(12)
    pages = pool.allocate(12)
    for page in (3, 5, 4, 2):
        pool.release([page])
    assert pool.allocate(4, expected=4) == [2, 3, 4, 5]
    pool.check_integrity([pages[:2], [2, 3, 4, 5], pages[6:]])


def test_a_page_is_free_only_when_its_last_owner_released_it() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.retain(pages)
    pool.release(pages)
    assert pool.num_free == 2
    pool.release(pages)
    assert pool.num_free == 4


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    with pytest.raises(PagesExhausted) as caught:
        pool.allocate(2, after=pages[-1])
    assert (caught.value.needed, caught.value.total) == (2, 1)
    pool.check_integrity([pages])


def test_each_pin_has_its_own_generation_and_keeps_pages_from_being_reused() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    generations = [pool.pin(pages), pool.pin(pages)]
    pool.release(pages)
    assert len(set(generations)) == 2 and 0 not in generations
    assert pool.num_free == 2
    for generation in generations:
        pool.unpin(generation)
    assert pool.num_free == 4 and pool.pin(pool.allocate(1)) not in generations


ACTIONS = st.sampled_from(["new", "grow", "share", "drop", "pin", "unpin"])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(ACTIONS, st.integers(0, 9)), max_size=80))
def test_any_history_keeps_every_page_free_or_owned(num_pages: int, history: list[tuple[str, int]]) -> None:
    pool, owners, pins = PagePool(num_pages), list[list[int]](), list[int]()
    for action, number in history:
        owner = owners[number % len(owners)] if owners else None
        match action:
            case "new" if number <= pool.num_free:
                owners.append(pool.allocate(number, expected=2 * number))
            case "grow" if owner and pool.num_free:
                owner += pool.allocate(1, after=owner[-1])
            case "share" if owner:
                pool.retain(owner)
                owners.append(list(owner))
            case "drop" if owner is not None:
                owners.pop(number % len(owners))
                pool.release(owner)
            case "pin" if owner:
                pins.append(pool.pin(owner))
            case "unpin" if pins:
                pool.unpin(pins.pop(number % len(pins)))
        pool.check_integrity(owners)
    for owner in owners:
        pool.release(owner)
    for generation in pins:
        pool.unpin(generation)
    pool.check_integrity([])
    assert pool.allocate(num_pages) == list(range(num_pages))
