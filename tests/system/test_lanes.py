"""Lanes of single workers: used where the prompt is cached, and never a trap for the jobs in them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.messages import FinalRecord, Job
from coordinator.routing import RoutingPolicy
from coordinator.sampling import SamplingParams
from coordinator.tokenizer import read_json
from producers.client import TokenmillClient
from tests.system.farm import Farm
from tests.system.test_mock_fleet import start_fleet
from workers.mock_engine import prompt_digest, token_at

pytestmark = [pytest.mark.system, pytest.mark.services]

NUM_NEW = 6
PARAMS = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)
DEADLINE_S = 60.0


@contextlib.asynccontextmanager
async def client_of(farm: Farm, policy: RoutingPolicy | None = None) -> AsyncIterator[TokenmillClient]:
    async with await TokenmillClient.connect(farm.services.nats_url, farm.services.redis_url, model=farm.model, routing=policy) as client:
        yield client


async def answer(client: TokenmillClient, prompt: list[int]) -> FinalRecord:
    handle = await client.submit(prompt, PARAMS)
    await asyncio.wait_for(handle.result(), DEADLINE_S)
    return await client.final_record(handle.job_id, DEADLINE_S)


def is_right(record: FinalRecord, prompt: list[int], model_dir: Path) -> bool:
    vocab_size = int(read_json(model_dir / "config.json")["vocab_size"])
    expected = [token_at(prompt_digest(prompt), index, vocab_size) for index in range(NUM_NEW)]
    return record.token_ids == b"".join(token.to_bytes(4, "little") for token in expected)


async def test_turns_of_a_conversation_meet_their_cache_until_its_worker_dies_and_then_go_on_elsewhere(
        tiny_v3: Path, tmp_path: Path) -> None:
    policy = RoutingPolicy(prefix_affinity=True, min_saving=16)
    with Farm(tmp_path, tiny_v3) as farm:
        for number in range(4):
            start_fleet(farm, f"f{number}", "--workers", "1", "--prefix_affinity", "on", "--mock_costs", "step_ms=1")
        await farm.wait_registered(*(f"f{number}-0" for number in range(4)))
        async with client_of(farm, policy) as client:
            assert client.router is not None
            conversation = list(range(10, 110))
            first = await answer(client, conversation)
            home = first.workers[0].partition(".")[0]
            await asyncio.sleep(2.0)      # the cache is told of, the router looks
            for turn in range(3):
                conversation += [150 + turn] * 32
                record = await answer(client, conversation)
                assert record.workers[0].startswith(f"{home}.") and record.cached_tokens >= 96
                await asyncio.sleep(0.6)
            # Into the lane of a worker that dies: taken by others, each once, each whole.
            jobs = [Job(job_id=f"left-{n}", origin=client.origin, model=farm.model, prompt_ids=(*conversation, n), params=PARAMS)
                    for n in range(5)]
            farm.processes.pop(home.partition("-")[0]).kill()
            for job in jobs:
                await client.bus.publish_job(job, lane=subjects.worker_lane(home))
            records = [await client.final_record(job.job_id, DEADLINE_S) for job in jobs]
            assert all(is_right(record, list(job.prompt_ids or ()), tiny_v3) for job, record in zip(jobs, records, strict=True))
            assert not any(record.workers[0].startswith(f"{home}.") for record in records)
        await farm.wait_at_rest()


async def test_jobs_in_the_lane_of_a_full_worker_are_taken_by_one_that_has_room(tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        slow = ("--running_max_req_size", "1", "--mock_costs", "step_ms=900")
        start_fleet(farm, "slow", "--workers", "1", "--prefix_affinity", "on", *slow)
        await farm.wait_registered("slow-0")
        async with client_of(farm) as client:
            jobs = [Job(job_id=f"job-{n}", origin=client.origin, model=farm.model, prompt_ids=(5, 6, n), params=PARAMS) for n in range(6)]
            for job in jobs:
                await client.bus.publish_job(job, lane=subjects.worker_lane("slow-0"))
            start_fleet(farm, "quick", "--workers", "2", "--mock_costs", "step_ms=1")
            records = [await client.final_record(job.job_id, DEADLINE_S) for job in jobs]
            assert all(is_right(record, list(job.prompt_ids or ()), tiny_v3) for job, record in zip(jobs, records, strict=True))
            assert sum(record.workers[0].startswith("quick-") for record in records) >= 4
        await farm.wait_at_rest()


async def test_short_prompts_are_prefilled_by_decode_workers_and_go_to_prefill_workers_when_those_are_gone(
        tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        start_fleet(farm, "p", "--prefill_workers", "1", "--mock_costs", "step_ms=1")
        start_fleet(farm, "d", "--decode_workers", "1", "--disagg_min_tokens", "50", "--mock_costs", "step_ms=1")
        await farm.wait_registered("p-0", "d-0")
        async with client_of(farm, RoutingPolicy(disagg_min_tokens=50)) as client:
            short, long = list(range(3, 23)), list(range(3, 83))
            record = await answer(client, short)
            assert [owner.partition(".")[0] for owner in record.workers] == ["d-0"] and is_right(record, short, tiny_v3)
            record = await answer(client, long)
            assert [owner.partition(".")[0] for owner in record.workers] == ["p-0", "d-0"] and is_right(record, long, tiny_v3)
            farm.processes.pop("d").kill()
            start_fleet(farm, "e", "--decode_workers", "1", "--mock_costs", "step_ms=1")   # serves no prompts
            await client.bus.publish_job(Job(job_id="left", origin=client.origin, model=farm.model, prompt_ids=tuple(short), params=PARAMS),
                                         lane=subjects.LOCAL_LANE)
            record = await client.final_record("left", DEADLINE_S)
            assert [owner.partition(".")[0] for owner in record.workers] == ["p-0", "e-0"] and is_right(record, short, tiny_v3)
        await farm.wait_at_rest()


async def test_a_lane_that_was_never_served_gives_its_jobs_to_any_worker(tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        start_fleet(farm, "f", "--workers", "2", "--mock_costs", "step_ms=1")
        await farm.wait_registered("f-0", "f-1")
        async with await Bus.connect(farm.services.nats_url, "test") as bus:
            await bus.publish_job(Job(job_id="ghost", origin="test", model=farm.model, prompt_ids=(4, 5), params=PARAMS), lane="w-ghost")
        async with client_of(farm) as client:
            assert is_right(await client.final_record("ghost", DEADLINE_S), [4, 5], tiny_v3)
        await farm.wait_at_rest()


async def test_handles_go_to_decode_workers_of_the_same_host_and_to_others_when_those_do_not_come(tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        start_fleet(farm, "near", "--decode_workers", "1", "--host", "one", "--mock_costs", "step_ms=1")
        start_fleet(farm, "far", "--decode_workers", "2", "--host", "two", "--mock_costs", "step_ms=1")
        await farm.wait_registered("near-0", "far-0", "far-1")
        start_fleet(farm, "p", "--prefill_workers", "1", "--host", "one", "--mock_costs", "step_ms=1")
        await farm.wait_registered("p-0")
        await asyncio.sleep(0.5)     # the giver looks who is there
        async with client_of(farm) as client:
            prompts = [[5, 6, n] for n in range(12)]
            records = await asyncio.gather(*(answer(client, prompt) for prompt in prompts))
            assert {owner.partition(".")[0] for record in records for owner in record.workers} == {"p-0", "near-0"}
            farm.processes.pop("near").kill()
            records = await asyncio.gather(*(answer(client, prompt) for prompt in prompts))
            assert all(is_right(record, prompt, tiny_v3) for record, prompt in zip(records, prompts, strict=True))
            assert {owner.partition(".")[0] for record in records for owner in record.workers} <= {"p-0", "far-0", "far-1"}
        await farm.wait_at_rest()


async def test_real_workers_and_shims_do_as_the_mock_ones(tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        for name in ("one", "two", "three"):
            farm.worker("both", name, "--prefix_affinity", "on", "--page_size", "16")
        farm.rest("rest", "--prefix_affinity", "on", wait=False)
        await farm.wait_registered("one", "two", "three")
        farm.wait_ready()
        prompt, homes = list(range(10, 250)), set()
        async with httpx.AsyncClient(base_url=farm.url(), timeout=60.0) as http, await Bus.connect(farm.services.nats_url, "test") as bus:
            for turn in range(5):
                body = {"inputs": prompt, "parameters": {"max_new_tokens": 4, "ignore_eos": True, "return_details": True}}
                reply = (await http.post("/generate", json=body)).raise_for_status()
                record = await TokenmillClient(bus, None, model=farm.model, origin="t").final_record(reply.headers["x-job-id"], DEADLINE_S)
                homes.add(record.workers[0])
                assert (record.cached_tokens >= 224) == (turn > 0)
                prompt += [token["id"] for token in reply.json()["tokens"]]
                await asyncio.sleep(2.0)
        assert len(homes) == 1
        await farm.wait_at_rest()
