"""Where a handle is offered first, by who is there."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

from coordinator.store import WorkerView
from workers.host_lane import HostLane, offer_lane


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


async def test_of_a_job_that_is_gone_nothing_is_remembered() -> None:
    bus: Any = AsyncMock()
    lane = HostLane(bus, AsyncMock(), "m", "a")
    lane._lane = "h-a"
    here, gone = (SimpleNamespace(key=key, is_background=False) for key in ("here:1", "gone:1"))
    for active in (here, gone):
        await lane.publish(active, b"")  # type: ignore[arg-type]
    lane.keep({here.key})
    assert set(lane._offers) == {here.key}
