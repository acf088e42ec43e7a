"""Where a handle is offered first, by who is there."""

from coordinator.store import WorkerView
from workers.host_lane import offer_lane


def worker(role: str, *lanes: str, is_alive: bool = True, state: str = "serving") -> WorkerView:
    return WorkerView(worker=f"{role}-{lanes}", incarnation=1, is_alive=is_alive, expires_in_s=1.0, num_owned=0,
                      info={"role": role, "handoff_lanes": list(lanes), "state": state})


def test_a_lane_of_its_host_only_where_decode_workers_are_both_there_and_elsewhere() -> None:
    here, there = worker("decode", "h-a"), worker("decode", "h-b")
    assert offer_lane([worker("prefill"), here, there], "a") == "h-a"
    assert offer_lane([here], "a") == "any"
    assert offer_lane([there], "a") == "any"
    assert offer_lane([worker("decode", "h-a", is_alive=False), there], "a") == "any"
    assert offer_lane([worker("decode", "h-a", state="draining"), there], "a") == "any"
    assert offer_lane([here, worker("decode")], "a") == "h-a"
    assert offer_lane([], "a") == "any"
