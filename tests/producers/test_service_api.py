"""Readiness, health and load, measured on real servers; and the shim as a process of its own."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.messages import Job
from coordinator.store import Store
from producers.settings import RestSettings, parse
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, answer, run

pytestmark = pytest.mark.services


def info(role: str, model: str, **stats: int) -> dict[str, Any]:
    return {"role": role, "model": model, "max_total_tokens": 1600, "stats": {"total_pages": 100, **stats}}


async def test_a_farm_without_workers_is_alive_but_not_ready(rest: Rest, model: str) -> None:
    for method in ("GET", "POST"):
        assert (await rest.http.request(method, "/liveness")).json() == {"status": "ok"}
        readiness = await rest.http.request(method, "/readiness")
        assert readiness.status_code == 503
        assert readiness.json()["message"] == f"no live worker of role prefill and none of role decode (nor of role both) for model {model}"
    for path in ("/health", "/healthz"):
        health = await rest.http.get(path)
        assert (health.status_code, health.json()) == (503, {"message": "Error"})
        assert (await rest.http.head(path)).status_code == 503


@pytest.mark.parametrize(("roles", "is_ready", "missing"), [
    (["both"], True, ""), (["prefill", "decode"], True, ""),
    (["prefill"], False, "role decode"), (["decode", "decode"], False, "role prefill")])
async def test_ready_is_a_live_worker_of_each_role(open_rest: OpenRest, redis_url: str, model: str, roles: list[str], is_ready: bool,
                                                   missing: str) -> None:
    store = Store(redis_url)
    for i, role in enumerate(roles):
        await store.register(f"w{i}", info(role, model))
    await store.register("stranger", info("both", "another-model"))
    async with open_rest() as rest:
        readiness, health = await rest.http.get("/readiness"), await rest.http.get("/health")
        assert (readiness.status_code, health.status_code) == ((200, 200) if is_ready else (503, 503))
        assert readiness.json() == {"status": "ok"} if is_ready else missing in readiness.json()["message"]
        assert health.json() == {"message": "Ok" if is_ready else "Error"}
    await store.close()


async def test_a_worker_whose_lease_has_lapsed_does_not_count(open_rest: OpenRest, redis_url: str, model: str) -> None:
    store = Store(redis_url, lease_s=0.001)
    await store.register("w", info("both", model))
    async with open_rest() as rest:
        assert (await rest.http.get("/readiness")).status_code == 503
    await store.close()


@pytest.mark.parametrize("server", ["nats", "redis"])
async def test_a_server_that_is_away_makes_the_farm_not_ready(own_services: EmbeddedServices, open_rest: OpenRest, model: str,
                                                              server: str) -> None:
    store = Store(own_services.redis_url)
    await store.register("w", info("both", model))
    await store.close()
    async with open_rest(nats_url=own_services.nats_url, redis_url=own_services.redis_url) as rest:
        getattr(own_services, server).kill()
        response = await rest.http.get("/readiness")
        assert response.status_code == 503 and server in response.json()["message"].lower()
        assert (await rest.http.get("/liveness")).status_code == 200
        getattr(own_services, server).start()
        await rest.app.state.shim.client.bus.flush()  # connected again


async def test_token_load_sums_the_pools_of_live_workers(open_rest: OpenRest, redis_url: str, model: str) -> None:
    store = Store(redis_url)
    await store.register("a", info("both", model, free_pages=50, cached_pages=30, free_tokens=800))   # 20 in use, 50 spoken for
    await store.register("b", info("both", model, free_pages=100, cached_pages=0, free_tokens=1600))
    async with open_rest() as rest:
        load = (await rest.http.get("/token_load")).json()
    assert load == {"current_load": 0.1, "logical_max_load": 0.25, "dynamic_max_load": 0.25}
    await store.close()


async def test_names_and_addresses(rest: Rest, model: str) -> None:
    for method in ("GET", "POST"):
        assert (await rest.http.request(method, "/get_model_name")).json() == {"model_name": model}
    bootstrap = (await rest.http.get("/bootstrap")).json()
    assert bootstrap["nats_url"].startswith("nats://") and bootstrap["redis_url"].startswith("redis://")


def test_flags_map_onto_settings_in_both_spellings() -> None:
    flags = ["--nats_url", "nats://x", "--redis-url", "redis://x", "--model_dir", "m", "--max-req-total-len", "9", "--access_log"]
    assert parse(flags) == RestSettings(nats_url="nats://x", redis_url="redis://x", model_dir="m", max_req_total_len=9, access_log=True)


async def start_process(nats_url: str, redis_url: str, model: str, model_dir: Path, port: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "producers.rest", "--nats_url", nats_url, "--redis_url", redis_url, "--model_name", model,
        "--model_dir", str(model_dir), "--port", str(port), stderr=asyncio.subprocess.PIPE)


async def test_sigterm_lets_a_running_stream_end(nats_url: str, redis_url: str, bus: Bus, model: str, model_dir: Path,
                                                 unused_tcp_port: int) -> None:
    go_on = asyncio.Event()

    async def pause_after_the_first(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 1))
        await go_on.wait()
        await worker.emit(job, run(job, 1, 3, finish="stop"))

    process = await start_process(nats_url, redis_url, model, model_dir, unused_tcp_port)
    url = f"http://127.0.0.1:{unused_tcp_port}/generate_stream"
    async with (FakeWorker(bus, model, serve=pause_after_the_first) as worker,
                httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=50), timeout=30) as http,
                http.stream("POST", url, json={"inputs": "Hi"}) as response):
        lines = response.aiter_lines()
        received = await anext(lines)
        process.send_signal(signal.SIGTERM)
        go_on.set()
        async for line in lines:
            received += line
    assert received.count("data:") == 4 and '"finish_reason":"stop"' in received
    assert answer(worker.jobs[0].job_id, 1).strip() in received
    assert await process.wait() == 0


async def test_a_wrong_model_folder_is_said_in_one_line(nats_url: str, redis_url: str, model: str, tmp_path: Path) -> None:
    process = await start_process(nats_url, redis_url, model, tmp_path / "missing", 0)
    _, stderr = await process.communicate()
    assert process.returncode == 1
    assert stderr.decode() == f"REST shim: model_dir: {tmp_path / 'missing'} is not a folder\n"
