"""A worker on its way in or out when something else goes wrong."""

import asyncio
from pathlib import Path

import pytest

from coordinator import orders
from coordinator.bus import Bus
from coordinator.errors import Unavailable
from coordinator.messages import Job
from coordinator.sampling import SamplingParams
from coordinator.store import Store
from workers.mock_link import MockLink
from workers.settings import EngineSettings, WorkerSettings
from workers.worker import Worker

pytestmark = [pytest.mark.system, pytest.mark.services]


def settings_of(nats_url: str, redis_url: str, model_dir: Path, model: str, *, prefix_affinity: bool = False) -> WorkerSettings:
    engine = EngineSettings(model_dir=str(model_dir), model_name=model, role="both", engine="mock", mock_costs="step_ms=200")
    return WorkerSettings(nats_url=nats_url, redis_url=redis_url, worker_id="leaver", engine=engine, drain_timeout_s=600.0,
                          prefix_affinity=prefix_affinity)


async def test_an_engine_that_ends_while_its_worker_drains_gives_the_jobs_back_at_once(
        nats_url: str, redis_url: str, tiny_v3: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    links: list[MockLink] = []
    start = MockLink.start

    async def kept_start(settings: EngineSettings) -> MockLink:
        links.append(await start(settings))
        return links[-1]

    monkeypatch.setattr(MockLink, "start", kept_start)
    store = Store(redis_url)
    running = asyncio.create_task(Worker(settings_of(nats_url, redis_url, tiny_v3, model)).run())
    async with asyncio.timeout(60), await Bus.connect(nats_url, "test") as bus:
        while not any(view.is_serving for view in await store.workers(model)):
            await asyncio.sleep(0.02)
        await bus.publish_job(Job(job_id="long", origin="test", model=model, prompt_ids=(4, 5),
                                  params=SamplingParams(max_new_tokens=1500, ignore_eos=True)))
        while (await store.job("long")).get("state") != "owned":
            await asyncio.sleep(0.02)
        await orders.give(bus, "leaver", orders.Order(kind="drain"))
        while any(view.is_serving for view in await store.workers(model)):
            await asyncio.sleep(0.02)
        links[0]._task.cancel()
        assert await running == 1
        assert (await store.job("long"))["state"] == "queued"
    await store.close()


async def test_a_life_that_could_not_begin_leaves_no_lease_behind(
        nats_url: str, redis_url: str, tiny_v3: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [Unavailable("NATS is away")]
    ensure = Bus.ensure_lane

    async def ensure_the_second_time(bus: Bus, model: str, lane: str) -> None:
        if failures:
            raise failures.pop()
        await ensure(bus, model, lane)

    monkeypatch.setattr(Bus, "ensure_lane", ensure_the_second_time)
    store = Store(redis_url)
    worker = Worker(settings_of(nats_url, redis_url, tiny_v3, model, prefix_affinity=True))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        while not any(view.is_serving for view in await store.workers(model)) or failures:
            await asyncio.sleep(0.02)
        worker.stop()
        assert await running == 0
        assert await store.workers(model) == []
    await store.close()
