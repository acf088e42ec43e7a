"""Which lane a job takes, as a function of what is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.routing import RouteRequest, RoutingPolicy, Snapshot, WorkerLoad, choose_lane
from coordinator.subjects import ANY_LANE, LOCAL_LANE

ON = RoutingPolicy(prefix_affinity=True, disagg_min_tokens=100, min_saving=32, max_load=1.25)
AFFINITY = RoutingPolicy(prefix_affinity=True, min_saving=32)


def both(name: str, backlog: int = 0, num_jobs: int = 0, *, has_room: bool = True) -> WorkerLoad:
    return WorkerLoad(worker=name, lane=f"w-{name}", role="both", backlog=backlog, num_jobs=num_jobs, has_room=has_room)


def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    snapshot = Snapshot(workers=(both("a"), both("b")))
    assert choose_lane(RouteRequest(num_tokens=500, cached={"b": 400}), snapshot, AFFINITY) == "w-b"
    assert choose_lane(RouteRequest(num_tokens=500), snapshot, AFFINITY) == ANY_LANE


@pytest.mark.parametrize(("backlog", "lane"), [(0, "w-b"), (150, "w-b"), (300, ANY_LANE)])
def test_a_backlog_that_costs_more_than_the_cache_saves_sends_it_to_any(backlog: int, lane: str) -> None:
    snapshot = Snapshot(workers=(both("a"), both("b", backlog)))
    assert choose_lane(RouteRequest(num_tokens=500, cached={"b": 400}), snapshot, AFFINITY) == lane


def test_what_every_worker_has_cached_is_no_reason_to_choose_one() -> None:
    snapshot = Snapshot(workers=(both("a"), both("b")))
    assert choose_lane(RouteRequest(num_tokens=500, cached={"a": 400, "b": 400}), snapshot, AFFINITY) == ANY_LANE


def test_a_worker_with_more_than_its_share_of_jobs_or_without_room_gets_none_by_its_lane() -> None:
    request = RouteRequest(num_tokens=500, cached={"b": 400})
    assert choose_lane(request, Snapshot(workers=(both("a", num_jobs=2), both("b", num_jobs=20))), AFFINITY) == ANY_LANE
    assert choose_lane(request, Snapshot(workers=(both("a", num_jobs=2), both("b", num_jobs=5))), AFFINITY) == "w-b"
    assert choose_lane(request, Snapshot(workers=(both("a"), both("b", has_room=False))), AFFINITY) == ANY_LANE


def test_short_or_mostly_cached_prompts_go_to_decode_workers_where_there_are_any() -> None:
    decode = WorkerLoad(worker="d", lane="w-d", role="decode")
    prefill = WorkerLoad(worker="p", lane="w-p", role="prefill")
    apart = Snapshot(workers=(prefill, decode))
    assert choose_lane(RouteRequest(num_tokens=99), apart, ON) == LOCAL_LANE
    assert choose_lane(RouteRequest(num_tokens=100), apart, ON) == ANY_LANE
    assert choose_lane(RouteRequest(num_tokens=99), Snapshot(workers=(prefill,)), ON) == ANY_LANE
    two = Snapshot(workers=(prefill, decode, WorkerLoad(worker="e", lane="w-e", role="decode")))
    assert choose_lane(RouteRequest(num_tokens=1000, cached={"d": 950}), two, ON) == "w-d"
    assert choose_lane(RouteRequest(num_tokens=1000, cached={"d": 800, "p": 800}), two, ON) == ANY_LANE


loads = st.builds(
    WorkerLoad, worker=st.sampled_from("abcdef"), lane=st.sampled_from(["", "w-x", "w-y"]),
    role=st.sampled_from(["prefill", "decode", "both"]), backlog=st.integers(0, 5000), num_jobs=st.integers(0, 50), has_room=st.booleans())
snapshots = st.builds(Snapshot, workers=st.lists(loads, max_size=8, unique_by=lambda load: load.worker).map(tuple))
requests = st.builds(RouteRequest, num_tokens=st.integers(1, 5000),
                     cached=st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 6000)))
policies = st.builds(RoutingPolicy, prefix_affinity=st.booleans(), disagg_min_tokens=st.integers(0, 3000), min_saving=st.integers(0, 500),
                     max_load=st.floats(1.0, 3.0))


@given(requests, snapshots, policies)
def test_a_lane_is_always_one_that_somebody_alive_serves_and_has_room_for(
        request: RouteRequest, snapshot: Snapshot, policy: RoutingPolicy) -> None:
    lane = choose_lane(request, snapshot, policy)
    if lane == LOCAL_LANE:
        assert request.num_tokens < policy.disagg_min_tokens
        assert any(load.role == "decode" and load.has_room for load in snapshot.workers)
    elif lane != ANY_LANE:
        assert policy.prefix_affinity
        chosen = [load for load in snapshot.workers if load.lane == lane and load.has_room and request.cached.get(load.worker)]
        assert chosen
        assert any(load.role != "decode" or policy.disagg_min_tokens for load in chosen)


@given(requests, snapshots)
def test_with_both_policies_off_every_job_goes_to_any(request: RouteRequest, snapshot: Snapshot) -> None:
    assert choose_lane(request, snapshot, RoutingPolicy()) == ANY_LANE


@given(requests, snapshots, policies, st.integers(1, 10_000))
def test_more_backlog_at_a_worker_never_draws_a_job_to_it(
        request: RouteRequest, snapshot: Snapshot, policy: RoutingPolicy, more: int) -> None:
    lane = choose_lane(request, snapshot, policy)
    if lane.startswith("w-"):
        return
    heavier = Snapshot(workers=tuple(
        WorkerLoad(worker=load.worker, lane=f"w-{load.worker}", role=load.role, backlog=load.backlog + (more if load.worker == "a" else 0),
                   num_jobs=load.num_jobs, has_room=load.has_room) for load in snapshot.workers))
    plain = Snapshot(workers=tuple(
        WorkerLoad(worker=load.worker, lane=f"w-{load.worker}", role=load.role, backlog=load.backlog, num_jobs=load.num_jobs,
                   has_room=load.has_room) for load in snapshot.workers))
    if choose_lane(request, plain, policy) != "w-a":
        assert choose_lane(request, heavier, policy) != "w-a"
