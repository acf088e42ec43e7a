"""Mock workers under the real protocol: whole fleets of them die, and every answer is the one that its prompt asks for."""

import asyncio
from pathlib import Path

import pytest

from coordinator.sampling import SamplingParams
from coordinator.tokenizer import read_json
from producers.client import JobHandle, TokenmillClient
from tests.system.farm import Farm, Process
from workers.mock_engine import prompt_digest, token_at

pytestmark = [pytest.mark.system, pytest.mark.services]

NUM_NEW = 24
PARAMS = SamplingParams(max_new_tokens=NUM_NEW, ignore_eos=True)


def start_fleet(farm: Farm, name: str, *flags: str) -> Process:
    args = ["--nats_url", farm.services.nats_url, "--redis_url", farm.services.redis_url, "--model_dir", str(farm.model_dir),
            "--model_name", farm.model, "--name", name, "--lease_s", "2", *flags]
    process = farm.processes[name] = Process(name, "workers.mock_fleet", args, farm.folder)
    return process


async def answers(handles: list[JobHandle]) -> list[tuple[int, ...]]:
    results = await asyncio.wait_for(asyncio.gather(*(handle.result() for handle in handles)), 90.0)
    assert {result.reason for result in results} == {"length"}
    return [tuple(result.token_ids) for result in results]


def right_answer(prompt: list[int], vocab_size: int) -> tuple[int, ...]:
    return tuple(token_at(prompt_digest(prompt), index, vocab_size) for index in range(NUM_NEW))


@pytest.mark.parametrize("flags", [("--workers", "6"), ("--prefill_workers", "3", "--decode_workers", "3")], ids=["both", "apart"])
async def test_a_killed_fleet_leaves_its_jobs_to_another_and_no_token_is_lost_or_doubled(
        flags: tuple[str, ...], tiny_v3: Path, tmp_path: Path) -> None:
    vocab_size = int(read_json(tiny_v3 / "config.json")["vocab_size"])
    prompts = [[10 + number, *range(3, 40)] for number in range(60)]
    with Farm(tmp_path, tiny_v3) as farm:
        first = start_fleet(farm, "one", *flags, "--mock_costs", "step_ms=40")
        start_fleet(farm, "two", *flags, "--mock_costs", "step_ms=2")
        await farm.wait_registered("one-0", "one-5", "two-0", "two-5")
        async with await TokenmillClient.connect(farm.services.nats_url, farm.services.redis_url, model=farm.model) as client:
            handles = [await client.submit(prompt, PARAMS) for prompt in prompts]
            await asyncio.sleep(0.3)
            first.kill()
            assert await answers(handles) == [right_answer(prompt, vocab_size) for prompt in prompts]
        await farm.wait_at_rest()
        status = await farm.status()
        assert {row["engine"] for row in status["workers"]} == {"mock"}
