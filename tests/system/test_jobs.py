"""A job by its id: looked at, followed from another shim, gone on with after a lost connection, cancelled, expired, bounded per tenant."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from coordinator.messages import new_job_id
from tests.system.conftest import PD
from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

SECOND = "pd-2"
LONG = {"inputs": [9, 8, 7], "parameters": {"max_new_tokens": 1500, "ignore_eos": True}}
SHORT = {"inputs": [9, 8, 7], "parameters": {"max_new_tokens": 40, "ignore_eos": True}}


@pytest.fixture(scope="module")
def second(farm: Farm) -> str:
    farm.rest(SECOND, "--resume_grace_s", "1", "--max_tenant_jobs", "1", model=PD)
    return farm.url(SECOND)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


async def events(response: httpx.Response, stop_after: int = 10**9) -> list[tuple[int, dict[str, Any]]]:
    """(id, event) of each event, up to `stop_after` of them."""
    found: list[tuple[int, dict[str, Any]]] = []
    event_id = -1
    async for line in response.aiter_lines():
        if line.startswith("id:"):
            event_id = int(line[3:])
        elif line.startswith("data:"):
            found.append((event_id, json.loads(line[5:])))
            if len(found) == stop_after:
                break
    return found


async def state(http: httpx.AsyncClient, url: str, job_id: str) -> dict[str, Any]:
    reply = await http.get(f"{url}/jobs/{job_id}")
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def wait_done(http: httpx.AsyncClient, url: str, job_id: str) -> dict[str, Any]:
    while (seen := await state(http, url, job_id))["state"] != "done":
        await asyncio.sleep(0.02)
    return seen


async def test_a_cut_stream_goes_on_at_another_shim_without_gap_or_repeat(farm: Farm, second: str, http: httpx.AsyncClient) -> None:
    detailed = {**SHORT, "parameters": {**SHORT["parameters"], "return_details": True}}
    whole = (await http.post(f"{farm.url(PD)}/generate", json=detailed)).json()
    job_id = new_job_id()
    async with http.stream("POST", f"{farm.url(PD)}/generate_stream", json=SHORT, headers={"X-Job-Id": job_id}) as response:
        assert response.headers["x-job-id"] == job_id
        first = await events(response, stop_after=7)
    async with http.stream("GET", f"{second}/jobs/{job_id}/stream", headers={"Last-Event-ID": str(first[-1][0])}) as response:
        rest = await events(response)
    assert [i for i, _ in first + rest] == list(range(40))
    assert [e["token"]["id"] for _, e in first + rest] == [t["id"] for t in whole["tokens"]]
    assert rest[-1][1]["finish_reason"] == "length"
    again = (await http.post(f"{second}/generate", json=SHORT, headers={"Idempotency-Key": job_id})).json()
    assert again["generated_text"] == whole["generated_text"], "the same name is the same job, and its answer is kept"


async def test_a_job_whose_reader_never_comes_back_is_cancelled_after_the_grace(farm: Farm, second: str, http: httpx.AsyncClient) -> None:
    job_id = new_job_id()
    async with http.stream("POST", f"{second}/generate_stream", json=LONG, headers={"X-Job-Id": job_id}) as response:
        await events(response, stop_after=3)
    assert (await wait_done(http, second, job_id))["finish_reason"] == "cancelled"
    await farm.wait_at_rest(model=PD)


async def test_a_client_that_disconnects_frees_the_pages_on_both_sides(farm: Farm, http: httpx.AsyncClient) -> None:
    async with http.stream("POST", f"{farm.url(PD)}/generate_stream", json=LONG) as response:
        job_id = response.headers["x-job-id"]
        await events(response, stop_after=3)
    assert (await wait_done(http, farm.url(PD), job_id))["finish_reason"] == "cancelled"
    await farm.wait_at_rest(model=PD)


async def test_delete_cancels_from_any_shim_and_twice_is_fine(farm: Farm, second: str, http: httpx.AsyncClient) -> None:
    job_id = new_job_id()
    async with http.stream("POST", f"{farm.url(PD)}/generate_stream", json=LONG, headers={"X-Job-Id": job_id}) as response:
        for _ in range(2):
            assert (await http.delete(f"{second}/jobs/{job_id}")).status_code == 200
        last = (await events(response))[-1][1]
    assert last["finished"] and last["finish_reason"] == "cancelled"
    assert (await http.delete(f"{second}/jobs/{job_id}")).json()["state"] == "done"
    await farm.wait_at_rest(model=PD)


async def test_a_job_past_its_timeout_ends_as_expired(farm: Farm, http: httpx.AsyncClient) -> None:
    reply = await http.post(f"{farm.url(PD)}/generate", json=LONG, headers={"X-Timeout-S": "0.3"})
    assert reply.status_code == 408 and "expired" in reply.json()["message"]
    await farm.wait_at_rest(model=PD)


async def test_a_tenant_at_its_bound_gets_429_while_another_is_served(farm: Farm, second: str, http: httpx.AsyncClient) -> None:
    async with http.stream("POST", f"{second}/generate_stream", json=LONG, headers={"X-Tenant": "greedy"}) as response:
        await events(response, stop_after=1)
        refused = await http.post(f"{second}/generate", json=SHORT, headers={"X-Tenant": "greedy"})
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1 and "greedy" in refused.json()["message"]
        assert (await http.post(f"{second}/generate", json=SHORT, headers={"X-Tenant": "modest"})).status_code == 200
    await farm.wait_at_rest(model=PD)
    assert (await http.post(f"{second}/generate", json=SHORT, headers={"X-Tenant": "greedy"})).status_code == 200


async def test_every_class_is_served(farm: Farm, http: httpx.AsyncClient) -> None:
    for klass in ("interactive", "normal", "batch"):
        assert (await http.post(f"{farm.url(PD)}/generate", json=SHORT, headers={"X-Job-Class": klass})).status_code == 200


@pytest.mark.parametrize(("header", "value"), [
    ("X-Job-Id", "a.b"), ("X-Job-Class", "urgent"), ("X-Timeout-S", "soon"), ("X-Timeout-S", "-1"), ("Last-Event-ID", "x"),
    ("X-Tenant", "t" * 200),
])
async def test_a_header_that_makes_no_sense_is_refused_by_name(farm: Farm, http: httpx.AsyncClient, header: str, value: str) -> None:
    reply = await http.post(f"{farm.url(PD)}/generate", json=SHORT, headers={header: value})
    assert reply.status_code == 400 and reply.json()["message"].startswith(header)


async def test_an_unknown_job_is_404(farm: Farm, http: httpx.AsyncClient) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/stream")):
        assert (await http.request(method, f"{farm.url(PD)}/jobs/{new_job_id()}{path}")).status_code == 404
