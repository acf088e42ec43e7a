"""/metrics: jobs as this shim saw them, and the farm behind it."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.messages import Job
from coordinator.store import Store
from producers import metrics
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, run

pytestmark = pytest.mark.services


async def scraped(rest: Rest) -> dict[str, float]:
    response = await rest.http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return {" ".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
            for family in text_string_to_metric_families(response.text) for sample in family.samples}


async def test_jobs_are_counted_with_their_tokens_and_times(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        for _ in range(3):
            await rest.post("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    await rest.post("/generate", {"inputs": "Hi", "parameters": {"top_p": 7}})
    seen = await scraped(rest)
    assert (seen["lightllm_request_count_total"], seen["lightllm_request_success_total"]) == (3, 3)
    assert (seen["tokenmill_tokens_total prompt"], seen["tokenmill_tokens_total generated"]) == (6, 15)
    for name in ("first_token_duration", "mean_time_per_token_duration", "duration"):
        assert seen[f"lightllm_request_{name}_count"] == 3 and 0 < seen[f"lightllm_request_{name}_sum"] < 30
    assert (seen["tokenmill_http_responses_total 200 lightllm"], seen["tokenmill_http_responses_total 400 lightllm"]) == (4, 1)
    assert seen["tokenmill_open_jobs"] == 0


async def test_a_job_that_fails_is_a_failure_by_its_reason(rest: Rest, bus: Bus, model: str) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 1, finish="error", error="the engine failed"))

    async with FakeWorker(bus, model, serve=fail):
        await rest.post("/generate", {"inputs": "Hi"})
    seen = await scraped(rest)
    assert (seen["lightllm_request_failure_total"], seen["tokenmill_jobs_ended_total error"]) == (1, 1)
    assert seen["lightllm_request_first_token_duration_count"] == 0


async def test_the_farm_shows_its_queue_its_workers_and_their_pages(open_rest: OpenRest, bus: Bus, redis_url: str, model: str) -> None:
    store = Store(redis_url)
    await store.register("w", {"role": "both", "model": model, "stats": {"total_pages": 100, "free_pages": 50, "cached_pages": 30,
                                                                        "held_pages": 20, "running": 4, "waiting": 2, "pinned": 1}})
    await bus.publish_job(Job(job_id="a", origin="other", model=model, klass="batch", text="Hi"))
    async with open_rest() as rest:
        seen = await scraped(rest)
    assert seen["tokenmill_farm_visible"] == 1 and seen["tokenmill_workers both"] == 1
    assert (seen["tokenmill_queue_jobs batch waiting"], seen["tokenmill_queue_jobs normal waiting"]) == (1, 0)
    assert [seen[f"tokenmill_kv_pages {state}"] for state in ("total", "free", "cached", "held", "pinned")] == [100, 50, 30, 20, 1]
    assert (seen["lightllm_batch_current_size"], seen["lightllm_queue_size"], seen["lightllm_kv_cache_utilization_ratio"]) == (4, 3, 0.2)
    await store.close()


async def test_a_farm_that_cannot_be_seen_still_leaves_the_shims_own_figures(own_services: EmbeddedServices, open_rest: OpenRest,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_TIMEOUT_S", 0.2)
    async with open_rest(nats_url=own_services.nats_url, redis_url=own_services.redis_url) as rest:
        own_services.nats.kill()
        seen = await scraped(rest)
        assert seen["tokenmill_farm_visible"] == 0 and seen["lightllm_request_count_total"] == 0
        own_services.nats.start()
        await rest.app.state.shim.client.bus.flush()  # connected again
