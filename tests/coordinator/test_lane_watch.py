"""Lanes that nobody comes for are found, whatever else stands in the stream."""

import asyncio
from typing import Any

import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.lane_watch import LaneWatch
from coordinator.messages import decode_map
from coordinator.store import WorkerView

pytestmark = pytest.mark.services


def worker(name: str, model: str, **more: Any) -> WorkerView:
    return WorkerView(worker=name, incarnation=1, is_alive=True, expires_in_s=1.0, num_owned=0,
                      info={"model": model, "role": "both", "lanes": [subjects.worker_lane(name)], **more})


async def test_a_lane_whose_name_nobody_can_serve_keeps_no_other_from_being_looked_at(bus: Bus, model: str) -> None:
    called: list[str] = []
    await bus.subscribe(subjects.relief(model), lambda message: called.append(decode_map(message.data)["lane"]))
    for subject in (f"jobs.{model}.normal.w-a!", f"jobs.{model}/x.normal.w-a", f"jobs.{model}.normal.w-ghost"):
        await bus.store(subject, b"x", {})
    watch = LaneWatch(bus)
    assert await watch.look([]) == 1
    await bus.flush()
    async with asyncio.timeout(10):
        while called != ["w-ghost"]:
            await asyncio.sleep(0.01)


async def test_others_are_called_at_once_to_the_lane_of_a_worker_that_takes_nothing_new(bus: Bus, model: str) -> None:
    await bus.ensure_lane(model, subjects.worker_lane("a"))
    await bus.store(f"jobs.{model}.normal.w-a", b"x", {})
    assert await LaneWatch(bus).look([worker("a", model)]) == 0
    assert await LaneWatch(bus).look([worker("a", model, state="draining")]) == 1
