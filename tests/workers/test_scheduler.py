"""Which sequences run and what they own, at every stage of their lives."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import PagesExhausted
from coordinator.messages import KVLayout
from coordinator.sampling import SamplingParams
from workers.engine_messages import Failed, Imported, Pinned, Tokens
from workers.scheduler import Scheduler
from workers.sequence import ImportSource, Sequence, State
from workers.step import PageCopy, SchedulerSettings, Step

EOS = 99
LAYOUT = KVLayout(model="m", weights="w", kind="gqa", num_layers=1, row=1, dtype="float32", page_size=2)


def make_scheduler(**given: Any) -> Scheduler:
    values: dict[str, Any] = {"num_pages": 32, "page_size": 2, "chunk_size": 8, "max_batch_tokens": 16, "max_num_seqs": 8,
                              "eos_ids": frozenset({EOS}), **given}
    return Scheduler(SchedulerSettings(**values))


def make_sequence(job_id: str, token_ids: list[int], *, new: int = 4, shown: int = 0, prefill_only: bool = False, imported: int = 0,
                  is_background: bool = False, **params: Any) -> Sequence:
    num_prompt = len(token_ids) - shown
    source = None
    if imported:
        source = ImportSource(ranks=(), num_pages=100, page_ids=tuple(range(50, 50 + -(-imported // 2))), num_tokens=imported,
                              layout=LAYOUT)
    return Sequence(job_id=job_id, token_ids=list(token_ids), num_prompt=num_prompt, source=source, is_background=is_background,
                    params=SamplingParams(max_new_tokens=new, **params),
                    max_kv_tokens=len(token_ids) if prefill_only else num_prompt + new - 1)


def run_step(scheduler: Scheduler, token: int = 7) -> tuple[Step, list[Any]]:
    """One step in which every sequence that draws gets `token`. Returns the step and its events."""
    step = scheduler.schedule()
    check_batch(scheduler, step)
    scheduler.advance(step)
    events = scheduler.complete(step, [token] * len(step.sampled), [-1.0] * len(step.sampled)) if step.chunks else []
    scheduler.check_integrity()
    return step, [*step.imported, *events]


def check_batch(scheduler: Scheduler, step: Step) -> None:
    batch = scheduler.batch(step)
    assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping) == sum(batch.query_lens)
    assert len(set(batch.slot_mapping)) == len(batch.slot_mapping), "two tokens write to one slot"
    assert len(batch.token_ids) <= scheduler.settings.max_batch_tokens
    assert len(batch.logit_rows) == len(step.sampled)


def run_to_end(scheduler: Scheduler, token: int = 7) -> list[Any]:
    events: list[Any] = []
    while True:
        step, new = run_step(scheduler, token)
        events += new
        if not step.chunks:
            return events


def rows(events: list[Any]) -> list[tuple[str, int, int, str | None]]:
    return [(row.job_id, row.output_index, row.token_id, row.finish) for event in events if isinstance(event, Tokens) for row in event.rows]


def assert_nothing_is_held(scheduler: Scheduler) -> None:
    assert scheduler.num_live == 0 and scheduler.num_held_pages == 0 and scheduler.pool.num_pins == 0
    scheduler.check_integrity()


def test_a_prompt_runs_in_chunks_and_then_one_token_a_step() -> None:
    scheduler = make_scheduler(chunk_size=4)
    sequence = make_sequence("a", list(range(10)), new=2)
    scheduler.add(sequence)
    sizes = []
    while sequence.state is not State.FINISHED:
        step, events = run_step(scheduler)
        sizes.append(step.chunks[sequence])
    assert sizes == [4, 4, 2, 1]
    assert rows(events) == [("a", 1, 7, "length")]
    assert_nothing_is_held(scheduler)


def test_decodes_and_prefill_chunks_share_a_step_within_its_budget() -> None:
    scheduler = make_scheduler(chunk_size=8, max_batch_tokens=10)
    first, second, third = (make_sequence(name, [i] * 12, new=9) for i, name in enumerate("abc"))
    scheduler.add(first)
    run_step(scheduler)
    run_step(scheduler)
    scheduler.add(second)
    scheduler.add(third)
    step, _ = run_step(scheduler)
    assert step.chunks == {first: 1, second: 8, third: 1}


def test_sequences_are_admitted_in_order_of_arrival_up_to_the_limit() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(name, [ord(name)] * 3, new=3))
    step, _ = run_step(scheduler)
    assert [sequence.job_id for sequence in step.chunks] == ["a", "b"]
    assert (scheduler.stats().running, scheduler.stats().waiting) == (2, 1)
    finished = [job_id for job_id, _, _, finish in rows(run_to_end(scheduler)) if finish]
    assert finished == ["a", "b", "c"]


def test_a_prompt_that_is_cached_whole_still_runs_its_last_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1, 2, 3, 4, 5]))
    run_to_end(scheduler)
    again = make_sequence("b", [1, 2, 3, 4, 5])
    scheduler.add(again)
    step, events = run_step(scheduler)
    assert step.chunks == {again: 1}
    assert [event.prefilled for event in events] == [(("b", 4),)]
    even = make_sequence("c", [1, 2, 3, 4])
    scheduler.add(even)
    step, _ = run_step(scheduler)
    assert step.chunks[even] == 2, "the last full page holds the last token, so it runs again"


def test_a_prompt_finds_what_another_is_still_computing() -> None:
    scheduler = make_scheduler(chunk_size=4, max_batch_tokens=9)
    first, second = make_sequence("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]), make_sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 10])
    scheduler.add(first)
    run_step(scheduler)
    run_step(scheduler)
    scheduler.add(second)
    step, _ = run_step(scheduler)
    assert step.chunks == {first: 1, second: 1}
    assert first.page_table[:4] == second.page_table[:4] and scheduler.num_held_pages == 6


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    scheduler = make_scheduler(chunk_size=16, max_batch_tokens=64)
    for name in "abc":
        scheduler.add(make_sequence(name, [1, 2, 3, 4, 5, 6, 7, ord(name)], new=2))
    scheduler.add(make_sequence("d", [9, 9, 9], new=2))
    first, _ = run_step(scheduler)
    second, events = run_step(scheduler)
    assert [sequence.job_id for sequence in first.chunks] == ["a"], "order of arrival holds for d too"
    assert list(second.chunks.values()) == [1, 2, 2, 3]
    assert [row for event in events for row in event.prefilled] == [("b", 6), ("c", 6), ("d", 0)]


def test_prefill_is_reported_once_with_the_tokens_that_the_cache_had() -> None:
    scheduler = make_scheduler(chunk_size=4)
    scheduler.add(make_sequence("a", [1] * 10, new=3))
    events = run_to_end(scheduler)
    assert [row for event in events for row in event.prefilled] == [("a", 0)]


@pytest.mark.parametrize(("ignored", "token", "expected"), [
    (False, EOS, [("a", 0, EOS, "stop")]),
    (False, 7, [("a", 0, 7, None), ("a", 1, 7, "length")]),
    (True, EOS, [("a", 0, EOS, None), ("a", 1, EOS, "length")]),
])
def test_eos_ends_a_sequence_with_its_own_row_unless_ignored(ignored: bool, token: int, expected: list[Any]) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1, 2, 3], new=2, ignore_eos=ignored))
    assert rows(run_to_end(scheduler, token)) == expected


def test_a_stop_run_matches_output_tokens_only() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1, 7], new=9, stop_sequences=((7, 7), "text is not ours")))
    assert rows(run_to_end(scheduler)) == [("a", 0, 7, None), ("a", 1, 7, "stop")]


def test_a_resumed_sequence_goes_on_at_its_index() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1, 2, 3, 7, 7], new=4, shown=2))
    assert rows(run_to_end(scheduler)) == [("a", 2, 7, None), ("a", 3, 7, "length")]
    assert_nothing_is_held(scheduler)


def test_a_sequence_that_the_whole_pool_cannot_hold_is_refused() -> None:
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_sequence("fits", [1] * 5, new=4))
    with pytest.raises(PagesExhausted, match="needs 5 KV pages, the pool has 4"):
        scheduler.add(make_sequence("a", [1] * 6, new=4))
    assert scheduler.num_live == 1


def test_a_sequence_waits_while_the_projected_peak_does_not_fit() -> None:
    scheduler = make_scheduler(num_pages=8)
    scheduler.add(make_sequence("a", [1, 2], new=9))           # 10 tokens: 5 pages at its end
    scheduler.add(make_sequence("b", [3, 4], new=9))
    step, _ = run_step(scheduler)
    assert [sequence.job_id for sequence in step.chunks] == ["a"]
    assert scheduler.stats().free_tokens == 0, "what waits is promised already"
    assert [job for job, _, _, finish in rows(run_to_end(scheduler)) if finish] == ["a", "b"]


def test_a_sequence_that_ends_soon_makes_room_for_one_that_grows_late() -> None:
    scheduler = make_scheduler(num_pages=8)
    scheduler.add(make_sequence("short", [1] * 7, new=2))      # 4 pages now and at its end, two steps from now
    scheduler.add(make_sequence("long", [2, 3], new=13))       # 7 pages, but only at step 12
    step, _ = run_step(scheduler)
    assert [sequence.job_id for sequence in step.chunks] == ["short", "long"]
    run_to_end(scheduler)
    assert_nothing_is_held(scheduler)


def test_a_job_id_that_comes_again_starts_anew() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1, 2, 3]))
    run_step(scheduler)
    scheduler.add(make_sequence("a", [4, 5], new=1))
    assert rows(run_to_end(scheduler)) == [("a", 0, 7, "length")]
    assert_nothing_is_held(scheduler)


def test_when_the_pool_runs_out_the_youngest_starts_over_and_loses_no_token() -> None:
    scheduler = make_scheduler(num_pages=6)
    old, young = make_sequence("old", [1, 2, 3], new=8), make_sequence("young", [4, 5, 6], new=8)
    old.max_kv_tokens = young.max_kv_tokens = 6                # a wrong promise lets both in
    scheduler.add(old)
    scheduler.add(young)
    steps = 0
    while young.state is not State.WAITING or not young.token_ids[3:]:
        run_step(scheduler)
        steps += 1
        assert steps < 20
    assert old.state is State.RUNNING and young.page_table == [] and young.token_ids[:4] == [4, 5, 6, 7]
    young.max_kv_tokens = old.max_kv_tokens = 10
    ended = [(job, index) for job, index, _, finish in rows(run_to_end(scheduler)) if finish]
    assert ended == [("old", 7), ("young", 7)]
    assert_nothing_is_held(scheduler)


def test_cached_pages_give_way_to_new_sequences() -> None:
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_sequence("a", [1] * 7, new=1))
    run_to_end(scheduler)
    assert scheduler.stats().cached_pages == 3
    scheduler.add(make_sequence("b", [2] * 7, new=1))
    assert rows(run_to_end(scheduler)) == [("b", 0, 7, "length")]


def test_a_row_without_a_number_fails_its_own_sequence_only() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", [1]))
    scheduler.add(make_sequence("b", [2]))
    step = scheduler.schedule()
    scheduler.advance(step)
    events = scheduler.complete(step, [0, 7], [float("nan"), -1.0])
    assert [event.job_id for event in events if isinstance(event, Failed)] == ["a"]
    assert rows(events) == [("b", 0, 7, None)]
    scheduler.check_integrity()


# ---- role prefill ----


def test_role_prefill_pins_after_the_first_token_until_released() -> None:
    scheduler = make_scheduler(role="prefill", num_pages=4)
    scheduler.add(make_sequence("a", [1, 2, 3, 4, 5], prefill_only=True))
    events = run_to_end(scheduler)
    assert rows(events) == [("a", 0, 7, None)]
    pinned = events[-1]
    assert isinstance(pinned, Pinned) and pinned.num_tokens == 5 and len(pinned.page_ids) == 3
    scheduler.add(make_sequence("b", [6, 7, 8, 9], prefill_only=True))
    assert run_to_end(scheduler) == [], "the pinned pages leave no room"
    assert (scheduler.stats().pinned, scheduler.stats().held_pages, scheduler.stats().free_tokens) == (1, 3, 0)
    assert scheduler.release_pin("a")
    assert rows(run_to_end(scheduler)) == [("b", 0, 7, None)]
    assert scheduler.release_pin("b") and not scheduler.release_pin("b")
    assert_nothing_is_held(scheduler)


def test_released_prompts_are_found_again() -> None:
    scheduler = make_scheduler(role="prefill")
    scheduler.add(make_sequence("a", [1, 2, 3, 4, 5], prefill_only=True))
    run_to_end(scheduler)
    scheduler.release_pin("a")
    scheduler.add(make_sequence("b", [1, 2, 3, 4, 5, 6], prefill_only=True))
    assert [event.prefilled for event in run_to_end(scheduler) if isinstance(event, Tokens)] == [(("b", 4),)]


@pytest.mark.parametrize("ending", [{"new": 1}, {"stop_sequences": ((7,),)}])
def test_a_sequence_that_ends_with_its_first_token_is_never_pinned(ending: dict[str, Any]) -> None:
    scheduler = make_scheduler(role="prefill")
    scheduler.add(make_sequence("a", [1, 2, 3], prefill_only=True, **ending))
    events = run_to_end(scheduler)
    assert not any(isinstance(event, Pinned) for event in events)
    assert_nothing_is_held(scheduler)


# ---- role decode ----


def import_sequence(scheduler: Scheduler, sequence: Sequence) -> PageCopy:
    scheduler.add(sequence)
    step, _ = run_step(scheduler)
    (copy,) = step.copies
    return copy


def test_an_import_copies_then_waits_to_be_activated_then_decodes() -> None:
    scheduler = make_scheduler(role="decode")
    sequence = make_sequence("a", [1, 2, 3, 4, 5, 7], shown=1, new=3, imported=5)
    copy = import_sequence(scheduler, sequence)
    assert (copy.src_pages, len(copy.dst_pages), copy.num_tokens) == ([50, 51, 52], 3, 5)
    assert not scheduler.activate("a"), "not before the copy is done"
    assert run_to_end(scheduler) == []
    assert scheduler.finish_copy(copy) == Imported(job_id="a", ok=True)
    assert run_to_end(scheduler) == [] and scheduler.stats().importing == 1
    assert scheduler.activate("a")
    step, events = run_step(scheduler)
    assert step.chunks == {sequence: 1} and rows(events) == [("a", 1, 7, None)]
    run_to_end(scheduler)
    assert_nothing_is_held(scheduler)


def test_an_import_copies_only_what_the_own_cache_lacks() -> None:
    scheduler = make_scheduler(role="decode")
    scheduler.add(make_sequence("before", [1, 2, 3, 4, 8], new=1))
    run_to_end(scheduler)
    copy = import_sequence(scheduler, make_sequence("a", [1, 2, 3, 4, 5, 7], shown=1, imported=5))
    assert (copy.src_pages, copy.num_tokens) == ([52], 1)
    assert copy.sequence.page_table[-1:] == copy.dst_pages
    scheduler.cancel("a")
    scheduler.finish_copy(copy)
    scheduler.add(make_sequence("b", [1, 2, 3, 4, 7], shown=1, imported=4))
    step, events = run_step(scheduler)
    assert step.copies == [] and events == [Imported(job_id="b", ok=True)]


def test_pages_that_nobody_confirmed_are_not_shared() -> None:
    scheduler = make_scheduler(role="decode")
    copy = import_sequence(scheduler, make_sequence("a", [1, 2, 3, 4, 5, 7], shown=1, imported=5))
    scheduler.finish_copy(copy)
    scheduler.cancel("a")
    scheduler.add(make_sequence("b", [1, 2, 3, 4, 5]))
    step, _ = run_step(scheduler)
    assert list(step.chunks.values()) == [5]


def test_pages_of_a_cancelled_import_are_not_reused_while_they_are_written() -> None:
    scheduler = make_scheduler(role="decode", num_pages=4)
    copy = import_sequence(scheduler, make_sequence("a", [1, 2, 3, 4, 5, 7], shown=1, new=2, imported=5))
    assert scheduler.cancel("a") and copy.is_cancelled
    scheduler.add(make_sequence("b", [6] * 4, new=1))
    assert run_to_end(scheduler) == []
    assert scheduler.finish_copy(copy) is None
    assert rows(run_to_end(scheduler)) == [("b", 0, 7, "length")]
    assert_nothing_is_held(scheduler)


def test_a_failed_copy_frees_the_sequence_and_says_why() -> None:
    scheduler = make_scheduler(role="decode")
    copy = import_sequence(scheduler, make_sequence("a", [1, 2, 7], shown=1, imported=2))
    assert scheduler.finish_copy(copy, "gone") == Imported(job_id="a", ok=False, error="gone")
    assert_nothing_is_held(scheduler)


def test_cancel_frees_everything_at_every_stage() -> None:
    waiting, chunked, decoding = make_scheduler(num_pages=8), make_scheduler(chunk_size=2), make_scheduler()
    for scheduler, num_steps in ((waiting, 0), (chunked, 1), (decoding, 2)):
        scheduler.add(make_sequence("a", [1, 2, 3, 4, 5]))
        for _ in range(num_steps):
            run_step(scheduler)
        assert scheduler.cancel("a") and not scheduler.cancel("a")
        assert_nothing_is_held(scheduler)
    pinned = make_scheduler(role="prefill")
    pinned.add(make_sequence("a", [1, 2, 3], prefill_only=True))
    run_to_end(pinned)
    assert pinned.cancel("a")
    assert_nothing_is_held(pinned)
    imported = make_scheduler(role="decode")
    copy = import_sequence(imported, make_sequence("a", [1, 2, 7], shown=1, imported=2))
    imported.finish_copy(copy)
    assert imported.cancel("a")
    assert_nothing_is_held(imported)


# ---- background sequences ----


def test_background_sequences_queue_behind_the_others() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, is_background in (("batch1", True), ("a", False), ("batch2", True), ("b", False)):
        scheduler.add(make_sequence(name, [ord(name[0])] * 3, new=2, is_background=is_background))
    order = [job_id for job_id, _, _, finish in rows(run_to_end(scheduler)) if finish]
    assert order == ["a", "b", "batch1", "batch2"]
    assert_nothing_is_held(scheduler)


def test_background_tokens_of_a_step_are_few_and_fewer_still_beside_others() -> None:
    scheduler = make_scheduler(num_pages=100, chunk_size=40, max_batch_tokens=60, max_num_seqs=20, background_tokens=16)
    for number in range(16):
        scheduler.add(make_sequence(f"batch{number}", [number] * 4, new=20, is_background=True))
    sizes = [run_step(scheduler)[0].num_tokens for _ in range(8)]
    assert max(sizes) == 16, "nobody waits long for the end of such a step"
    scheduler.add(make_sequence("a", [90, 91, 92], new=3))
    prefill, beside = run_step(scheduler)[0], run_step(scheduler)[0]
    assert prefill.num_tokens == 3 + 1, "next to nothing while somebody waits for a first token"
    assert beside.num_tokens == 1 + 2, "an eighth while others decode"
    finished = {job_id for job_id, _, _, finish in rows(run_to_end(scheduler)) if finish}
    assert finished == {"a"} | {f"batch{number}" for number in range(16)}
    assert_nothing_is_held(scheduler)


def test_a_prompt_that_goes_on_by_one_token_may_stand_before_a_row_that_draws() -> None:
    """Such a step is none of decodes alone (ParallelSizes.agreed): its logits are not those of the rows in order."""
    scheduler = make_scheduler(chunk_size=4, background_tokens=4)
    scheduler.add(make_sequence("cached", [1, 2, 3, 4, 5], new=1))
    run_to_end(scheduler)
    scheduler.add(make_sequence("batch", [9] * 12, new=1, is_background=True))
    run_step(scheduler)
    scheduler.add(make_sequence("a", [1, 2, 3, 4, 5], new=1))
    step = scheduler.schedule()
    batch = scheduler.batch(step)
    assert batch.query_lens == [1, 1] and batch.logit_rows == [1]


@pytest.mark.parametrize("short", [{"max_num_seqs": 2}, {"num_pages": 6}])
def test_a_background_sequence_gives_way_when_slots_or_pages_are_short(short: dict[str, int]) -> None:
    scheduler = make_scheduler(**short)
    batch = [make_sequence(name, [ord(name)] * 3, new=4, is_background=True) for name in "xy"]
    for sequence in batch:
        scheduler.add(sequence)
    run_step(scheduler)
    assert [sequence.state for sequence in batch] == [State.RUNNING, State.RUNNING]
    first = make_sequence("a", [5, 6, 7], new=4)
    scheduler.add(first)
    step, _ = run_step(scheduler)
    assert first in step.chunks and [sequence.state for sequence in batch] == [State.RUNNING, State.WAITING]
    tokens = [token for job_id, _, token, _ in rows(run_to_end(scheduler)) if job_id == "y"]
    assert batch[1].state is State.FINISHED and len(batch[1].token_ids) == 7 and tokens, "it is computed again and goes on"
    assert_nothing_is_held(scheduler)


# ---- any history ----

ACTIONS = st.sampled_from(["add", "add", "import", "step", "step", "step", "copied", "copied", "copy fails", "activate", "release",
                           "cancel"])


@settings(max_examples=300, deadline=None)
@given(depth=st.integers(1, 2), role=st.sampled_from(["prefill", "decode", "both"]), num_pages=st.integers(8, 24),
       chunk_size=st.integers(1, 6), max_num_seqs=st.integers(1, 5), lies=st.booleans(), background_tokens=st.integers(0, 9),
       history=st.lists(st.tuples(ACTIONS, st.integers(0, 30)), max_size=120))
def test_any_history_keeps_all_pages_accounted_for_and_ends_with_none_held(
        depth: int, role: str, num_pages: int, chunk_size: int, max_num_seqs: int, lies: bool, background_tokens: int,
        history: list[tuple[str, int]]) -> None:
    scheduler = make_scheduler(role=role, num_pages=num_pages, chunk_size=chunk_size, max_num_seqs=max_num_seqs,
                               max_batch_tokens=max_num_seqs + chunk_size, depth=depth, background_tokens=background_tokens)
    flying: list[Step] = []
    copies: list[PageCopy] = []
    jobs: list[str] = []
    preempted = 0

    def step(token: int) -> bool:
        nonlocal preempted
        before = {s for s in scheduler._active if s.state is State.RUNNING}
        step = scheduler.schedule()
        preempted += sum(s.state is State.WAITING and not s.is_background for s in before)
        copies.extend(step.copies)
        check_batch(scheduler, step)
        if step.chunks:
            scheduler.advance(step)
            flying.append(step)
            scheduler.check_integrity()
        is_busy = bool(flying)
        while flying and (len(flying) >= depth or not step.chunks):
            oldest = flying.pop(0)
            scheduler.complete(oldest, [token] * len(oldest.sampled), [-1.0] * len(oldest.sampled))
        return is_busy

    for number, (action, value) in enumerate(history):
        job_id = jobs[value % len(jobs)] if jobs else "none"
        match action:
            case "add" | "import":
                # Few token values and lengths, so that prefixes are shared, and pools run full.
                prompt = [value % 2] * (1 + value % 7)
                imported = action == "import" and role != "prefill"
                new = make_sequence(f"job{number}", [*prompt, 7] if imported else prompt, new=2 + value % 9, shown=int(imported),
                                    prefill_only=role == "prefill", imported=len(prompt) if imported else 0,
                                    is_background=value % 3 == 0)
                if lies:
                    new.max_kv_tokens = len(new.token_ids)  # admitted too early: the pool will run out
                scheduler.add(new)
                jobs.append(new.job_id)
            case "step":
                step(EOS if value == 0 else value % 3)
            case "copied" if copies:
                scheduler.finish_copy(copies.pop(value % len(copies)))
            case "copy fails" if copies:
                scheduler.finish_copy(copies.pop(value % len(copies)), "broken")
            case "activate":
                scheduler.activate(job_id)
            case "release":
                scheduler.release_pin(job_id)
            case "cancel":
                scheduler.cancel(job_id)
        scheduler.check_integrity()
        stats = scheduler.stats()
        assert stats.free_pages + stats.cached_pages + stats.held_pages == num_pages
    for _ in range(1000):
        ran = step(1)
        for copy in copies:
            scheduler.finish_copy(copy)
        moved = any([scheduler.activate(job_id) or scheduler.release_pin(job_id) for job_id in jobs])
        if not (ran or copies or moved):
            break
        copies.clear()
    assert_nothing_is_held(scheduler)
    assert lies or not preempted, "an honest projection never preempts"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_new_role_starts_with_no_sequence_and_with_the_pages_that_were_computed(depth: int) -> None:
    scheduler = make_scheduler(role="prefill", depth=depth)
    for job_id, ids in (("pinned", [1, 2, 3, 4]), ("running", list(range(10, 30)))):
        scheduler.add(make_sequence(job_id, ids, prefill_only=True))
    run_step(scheduler)
    step = scheduler.schedule()
    scheduler.advance(step)                                                # in flight while the role changes
    scheduler.set_role("decode")
    assert scheduler.complete(step, [7] * len(step.sampled), [-1.0] * len(step.sampled)) == []
    scheduler.check_integrity()
    assert_nothing_is_held(scheduler)
    scheduler.add(make_sequence("next", [1, 2, 3, 4, 5], new=3))
    assert [row[0] for row in rows(run_to_end(scheduler))] == ["next"] * 3     # no first token that pins it: it decodes to its end
    assert scheduler.cache.num_evictable > 0
