"""What the planner proposes, and when a proposal is acted on."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner import Hysteresis, Objectives, Proposal, Snapshot, WorkerLoad, propose

OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.1)


def workers(prefill: int, decode: int, step_s: float = 0.0, pool_used: float = 0.0) -> tuple[WorkerLoad, ...]:
    return (*(WorkerLoad(worker=f"p{i}", role="prefill", num_running=i) for i in range(prefill)),
            *(WorkerLoad(worker=f"d{i}", role="decode", num_running=9 - i, step_s=step_s, pool_used=pool_used) for i in range(decode)))


def test_a_farm_within_its_objectives_is_left_alone() -> None:
    proposal = propose(Snapshot(workers=workers(2, 2, step_s=0.09), queue_age_s=1.5, ttft_s=1.9, tpot_s=0.08), OBJECTIVES)
    assert (proposal.kind, proposal.reason) == ("none", "within the objectives")


@pytest.mark.parametrize(("snapshot", "said"), [
    (Snapshot(workers=workers(1, 3), queue_age_s=5.0), "a job has waited 5.0 s"),
    (Snapshot(workers=workers(1, 3), ttft_s=3.0, tpot_s=0.02), "time to first token is 3.00 s"),
])
def test_when_jobs_wait_the_idlest_decode_worker_is_to_prefill(snapshot: Snapshot, said: str) -> None:
    proposal = propose(snapshot, OBJECTIVES)
    assert (proposal.kind, proposal.worker, proposal.role) == ("move", "d2", "prefill") and said in proposal.reason


@pytest.mark.parametrize(("snapshot", "said"), [
    (Snapshot(workers=workers(3, 1), tpot_s=0.2), "time per token is 200 ms"),
    (Snapshot(workers=workers(3, 1, step_s=0.15)), "a decode step takes 150 ms"),
    (Snapshot(workers=workers(3, 1, pool_used=0.97)), "KV pools of decode are 97% full"),
    (Snapshot(workers=workers(3, 1), handoff_age_s=4.0), "a finished prefill has waited 4.0 s"),
])
def test_when_decode_is_short_the_idlest_prefill_worker_is_to_decode(snapshot: Snapshot, said: str) -> None:
    proposal = propose(snapshot, OBJECTIVES)
    assert (proposal.kind, proposal.worker, proposal.role) == ("move", "p0", "decode") and said in proposal.reason


def test_jobs_that_wait_behind_finished_prefills_are_no_want_of_prefill() -> None:
    proposal = propose(Snapshot(workers=workers(3, 1), queue_age_s=30.0, ttft_s=30.0, handoff_age_s=3.0), OBJECTIVES)
    assert (proposal.kind, proposal.role) == ("move", "decode")


def test_when_nobody_can_be_spared_the_farm_is_told_to_grow() -> None:
    last = propose(Snapshot(workers=workers(1, 1), queue_age_s=9.0), OBJECTIVES)
    assert (last.kind, last.role) == ("grow", "prefill") and "no decode worker can be spared" in last.reason
    both_busy = propose(Snapshot(workers=workers(2, 2), queue_age_s=9.0, tpot_s=0.07), OBJECTIVES)
    assert both_busy.kind == "grow" and "decode would be at 140%" in both_busy.reason


ages = st.floats(0, 60)
loads = st.builds(WorkerLoad, worker=st.text("abc", min_size=1, max_size=3), role=st.sampled_from(["prefill", "decode", "both"]),
                  num_running=st.integers(0, 9), pool_used=st.floats(0, 1), step_s=st.floats(0, 1))
snapshots = st.builds(Snapshot, workers=st.lists(loads, max_size=6, unique_by=lambda load: load.worker).map(tuple), queue_age_s=ages,
                      handoff_age_s=ages, ttft_s=ages, tpot_s=st.floats(0, 1))


@given(snapshots, st.integers(1, 2), st.integers(1, 2))
def test_a_move_never_takes_the_last_worker_of_a_role_nor_one_that_has_the_role(snapshot: Snapshot, prefills: int, decodes: int) -> None:
    objectives = Objectives(min_prefill=prefills, min_decode=decodes)
    proposal = propose(snapshot, objectives)
    if proposal.kind == "move":
        mover = next(load for load in snapshot.workers if load.worker == proposal.worker)
        assert {mover.role, proposal.role} == {"prefill", "decode"}
        left = sum(load.role == mover.role for load in snapshot.workers) - 1
        assert left >= (prefills if mover.role == "prefill" else decodes)


@given(snapshots)
def test_what_a_move_gives_is_not_asked_back_at_once(snapshot: Snapshot) -> None:
    """Had the load been the same with the roles after the move, no move in the other direction would be proposed for the pools and steps
    that were there: the giver's side was seen to stay below its edge."""
    proposal = propose(snapshot, OBJECTIVES)
    if proposal.kind == "move":
        giver = proposal.prefill_pressure if proposal.role == "decode" else proposal.decode_pressure
        num_givers = sum(load.role != proposal.role and load.role != "both" for load in snapshot.workers)
        assert giver * num_givers / (num_givers - 1) < 1.0


def passes(hysteresis: Hysteresis) -> Callable[[str, float], bool]:
    def ask(role: str, now_s: float) -> bool:
        return hysteresis.passes(Proposal(kind="move", worker="w", role=role) if role else Proposal(kind="none"), now_s)

    return ask


def test_a_move_is_made_once_it_was_proposed_three_times_in_a_row_and_then_not_again_for_a_while() -> None:
    ask = passes(Hysteresis(rounds=3, rest_s=30.0))
    assert [ask("decode", t) for t in (0, 2, 4)] == [False, False, True]
    assert [ask("decode", t) for t in (6, 8, 10, 32)] == [False] * 4
    assert ask("decode", 34.0)
    ask = passes(Hysteresis(rounds=3, rest_s=30.0))
    assert not any(ask(role, t) for t, role in enumerate(["decode", "decode", "", "decode", "decode", "prefill", "prefill", "decode"]))
