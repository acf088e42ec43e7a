"""The planner on a real queue: what it sees, whom it orders, and what stands about it in the status."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.errors import ConfigError
from coordinator.members import Membership
from coordinator.messages import Job, new_job_id
from coordinator.orders import Order, give
from coordinator.planner import Hysteresis, Objectives
from coordinator.planning import Planning, planner_said, take_snapshot
from coordinator.store import Store
from workers.order_book import OrderBook

pytestmark = pytest.mark.services


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(redis_url)
    await store.found()
    yield store
    await store.close()


def info(model: str, role: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "model": model, "max_total_tokens": 100, "stats": {"running": 1, "free_tokens": 75}, **more}


async def farm(store: Store, model: str, prefill: int, decode: int) -> None:
    for role, number in (("prefill", prefill), ("decode", decode)):
        for i in range(number):
            await store.register(f"{role}-{i}", info(model, role, step_s=0.01))


async def test_a_snapshot_says_how_long_what_waits_has_waited(bus: Bus, store: Store, model: str) -> None:
    await farm(store, model, 1, 2)
    await store.register("leaver", info(model, "decode", state="draining"))
    member = Membership(store, "door", lambda: {"kind": "pd_master", "model": model, "ttft_p90_s": 1.25, "tpot_p90_s": 0.03})
    member.start()
    await bus.publish_job(Job(job_id=new_job_id(), origin="o", model=model, prompt_ids=(1,)))
    await bus.publish_handoff(model, b"a handle")
    await asyncio.sleep(0.3)
    seen = await take_snapshot(bus, store, model)
    await member.close()
    assert sorted(load.worker for load in seen.workers) == ["decode-0", "decode-1", "prefill-0"]
    assert 0.25 < seen.queue_age_s < 30 and 0.25 < seen.handoff_age_s < 30
    assert (seen.ttft_s, seen.tpot_s, seen.workers[0].pool_used, seen.workers[0].step_s) == (1.25, 0.03, 0.25, 0.01)


async def test_jobs_that_wait_in_a_workers_own_lane_are_seen_to_wait(bus: Bus, store: Store, model: str) -> None:
    lane = subjects.worker_lane("prefill-0")
    await store.register("prefill-0", info(model, "prefill", lanes=[lane]))
    await bus.ensure_lane(model, lane)
    assert (await take_snapshot(bus, store, model)).queue_age_s == 0.0
    await bus.publish_job(Job(job_id=new_job_id(), origin="o", model=model, prompt_ids=(1,)), lane=lane)
    await asyncio.sleep(0.3)
    assert 0.25 < (await take_snapshot(bus, store, model)).queue_age_s < 30


@pytest.mark.parametrize("mode", ["advise", "act"])
async def test_a_decision_is_ordered_only_when_the_planner_may_act_and_is_remembered_either_way(bus: Bus, store: Store, model: str,
                                                                                                   mode: Any) -> None:
    await farm(store, model, 1, 2)
    book = OrderBook("decode-0", "decode")
    await book.open(bus)
    await bus.publish_job(Job(job_id=new_job_id(), origin="o", model=model, prompt_ids=(1,)))
    planning = Planning(bus, store, "me", mode, Objectives(ttft_s=0.01), lambda: Hysteresis(rounds=2, rest_s=60))
    await asyncio.sleep(0.05)
    for _ in range(3):
        assert (await planning.look(model)).worker == "decode-0"
    assert book.role == ("prefill" if mode == "act" else "decode")
    said = await planner_said(store, model)
    assert said["mode"] == mode and said["proposal"]["kind"] == "move"
    (decision,) = said["decisions"]
    assert decision["worker"] == "decode-0" and decision["reason"] and (decision["done"] == "advised") == (mode == "advise")
    await book.close()


async def test_an_order_to_nobody_and_a_wrong_one_are_refused(bus: Bus) -> None:
    with pytest.raises(ConfigError, match="no worker nobody listens"):
        await give(bus, "nobody", Order(kind="drain"))
    book = OrderBook("w", "prefill")
    await book.open(bus)
    with pytest.raises(ConfigError, match="role must be one of"):
        await give(bus, "w", Order(kind="set_role", role="cook"))
    assert await give(bus, "w", Order(kind="set_role", role="prefill")) == "it is prefill already" and not book.came.is_set()
    assert "leaves" in await give(bus, "w", Order(kind="drain")) and book.is_leaving
    with pytest.raises(ConfigError, match="it is leaving"):
        await give(bus, "w", Order(kind="set_role", role="decode"))
    await book.close()
