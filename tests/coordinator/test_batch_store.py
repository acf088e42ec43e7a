"""Who leads a batch, and which status may follow which, against a real Redis."""

from collections.abc import AsyncIterator

import pytest

from coordinator.batch_store import BatchStore
from coordinator.store import Store

pytestmark = pytest.mark.services

ASKED = {"endpoint": "/generate"}


@pytest.fixture
async def batches(redis_url: str) -> AsyncIterator[BatchStore]:
    store = Store(redis_url)
    yield BatchStore(store)
    await store.close()


async def test_a_batch_is_created_once(batches: BatchStore) -> None:
    assert await batches.create("b", ASKED, 60.0) and not await batches.create("b", {"endpoint": "/other"}, 60.0)
    record = await batches.get("b")
    assert record["endpoint"] == "/generate" and record["status"] == "validating"
    assert int(record["expires_ms"]) - int(record["created_ms"]) == 60_000
    assert await batches.get("c") == {}


async def test_one_leads_at_a_time_and_a_former_leader_is_refused(batches: BatchStore) -> None:
    await batches.create("b", ASKED, 60.0)
    first = await batches.lead("b", "a", leader_s=0.0)
    second = await batches.lead("b", "z")          # the first lease has lapsed
    assert (first, second) == (1, 2)
    assert await batches.lead("b", "a") == 0
    assert await batches.beat("b", first, {"completed": 9}) == ""
    assert await batches.move("b", ("validating",), "in_progress", epoch=first) == ""
    assert await batches.beat("b", second, {"completed": 1}) == "validating"
    await batches.leave("b", first)
    assert await batches.lead("b", "a") == 0, "somebody who leads no more has nothing to leave"
    await batches.leave("b", second)
    assert await batches.lead("b", "a") == 3
    assert await batches.lead("gone", "a") == 0


async def test_counters_never_fall(batches: BatchStore) -> None:
    await batches.create("b", ASKED, 60.0)
    epoch = await batches.lead("b", "a")
    for completed in (5, 3):
        await batches.beat("b", epoch, {"completed": completed})
    assert (await batches.get("b"))["completed"] == "5"


async def test_a_status_follows_only_those_it_may_follow(batches: BatchStore) -> None:
    await batches.create("b", ASKED, 60.0)
    epoch = await batches.lead("b", "a")
    assert await batches.move("b", ("validating",), "in_progress", epoch=epoch, total=7) == "in_progress"
    assert await batches.move("b", ("validating",), "in_progress", epoch=epoch) == "in_progress", "done before: nothing changes"
    assert await batches.move("b", ("validating", "in_progress"), "cancelling") == "cancelling"
    assert await batches.move("b", ("in_progress",), "finalizing", epoch=epoch) == "cancelling"
    assert await batches.open_ids() == ["b"]
    assert await batches.move("b", ("cancelling",), "cancelled", epoch=epoch) == "cancelled"
    record = await batches.get("b")
    assert record["total"] == "7" and {"in_progress_at", "cancelling_at", "cancelled_at"} <= record.keys()
    assert "finalizing_at" not in record and await batches.open_ids() == []


async def test_pages_go_from_the_newest_to_the_oldest(batches: BatchStore) -> None:
    for i in range(1, 6):
        await batches.create(f"b{i}", ASKED, 60.0, created_ms=i)
    assert await batches.page("", 2) == ["b5", "b4"]
    assert await batches.page("b4", 10) == ["b3", "b2", "b1"]
    assert await batches.page("b1", 10) == [] and await batches.page("unknown", 10) == []
