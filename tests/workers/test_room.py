"""How much a worker pulls, by what it holds."""

from collections.abc import Callable, Sequence
from typing import cast

import pytest

from workers.active_job import Phase
from workers.engine_messages import Ready, Stats
from workers.jobs import Jobs
from workers.room import MAX_OFFERED, Room

NUM_SLOTS, CHUNK, POOL = 12, 100, 8000

Held = tuple[Phase, bool, int]    # where a job is, whether it is a background one, prompt tokens that wait


class Holding:
    """In the place of Jobs."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._held = held

    def num_in(self, *phases: Phase, background: bool = True) -> int:
        return sum(phase in phases and (background or not is_background) for phase, is_background, _ in self._held)

    def num_waiting_tokens(self, *, background: bool = True) -> int:
        return sum(tokens for _, is_background, tokens in self._held if background or not is_background)


class Sizes:
    max_num_seqs, chunk_size, max_total_tokens = NUM_SLOTS, CHUNK, POOL


class Free:
    def __init__(self, free_tokens: int) -> None:
        self.free_tokens = free_tokens


def room(*held: Held, free_tokens: int = POOL, is_fresh: bool = True) -> Room:
    stats = cast(Callable[[], Stats], lambda: Free(free_tokens))
    return Room(cast(Jobs, Holding(held)), cast(Ready, Sizes), lambda: is_fresh, stats)


FRONT, BACK = (Phase.RUNNING, False, 0), (Phase.RUNNING, True, 0)


def test_upper_classes_have_the_slots_that_background_jobs_hold() -> None:
    assert room(*[FRONT] * 3, *[BACK] * 9).for_jobs() == 9
    assert room(*[FRONT] * 3, *[BACK] * 9).for_background_jobs() == 0


def test_background_prompts_that_wait_keep_nobody_else_waiting() -> None:
    waiting = room((Phase.RUNNING, True, 2 * CHUNK))
    assert waiting.for_jobs() == NUM_SLOTS and waiting.for_background_jobs() == 0
    assert room((Phase.RUNNING, False, 2 * CHUNK)).for_jobs() == 0


def test_an_eighth_of_the_pool_is_kept_free_of_background_jobs() -> None:
    assert room(free_tokens=POOL // 8).for_background_jobs() == room(free_tokens=POOL // 8).for_background_handles() == 0
    assert room(free_tokens=POOL // 8 + 1).for_background_jobs() == NUM_SLOTS
    assert room(free_tokens=1).for_jobs() == NUM_SLOTS and room(free_tokens=0).for_jobs() == 0


def test_a_full_pool_still_takes_upper_classes_while_background_jobs_run_that_give_way() -> None:
    assert room(BACK, free_tokens=0).for_jobs() == NUM_SLOTS


def test_pinned_background_pages_are_few_since_they_give_way_to_nobody() -> None:
    pinned = (Phase.OFFERED, True, 0)
    assert room(*[pinned] * MAX_OFFERED).for_background_jobs() == 0 < room(*[pinned] * (MAX_OFFERED - 1)).for_background_jobs()
    assert room(*[pinned] * MAX_OFFERED).for_jobs() == NUM_SLOTS


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.CLAIMING, Phase.IMPORTING])
def test_whatever_is_on_its_way_into_the_engine_has_a_slot(phase: Phase) -> None:
    assert room((phase, False, 0)).for_jobs() == NUM_SLOTS - 1


def test_a_worker_whose_lease_is_not_fresh_takes_nothing() -> None:
    stale = room(is_fresh=False)
    assert (stale.for_jobs(), stale.for_background_jobs(), stale.for_handles(), stale.for_background_handles()) == (0, 0, 0, 0)
