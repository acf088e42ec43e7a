"""A worker of several ranks is one worker to everybody: the same tokens as one rank, and no rank's death loses or repeats any."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.system.served import Served

pytestmark = [pytest.mark.system, pytest.mark.services]

PROMPTS = [[7, 11, 13], list(range(20, 90)), [300] * 33, list(range(5, 200)), [400, 3, 3, 9], list(range(100, 116)), [50],
           list(range(9, 140, 2))]
NEW_TOKENS = 24


def greedy(model_dir: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """By transformers, fp32, the same weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        return [model.generate(torch.tensor([p]), generation_config=config)[0, len(p):].tolist() for p in prompts]


async def stream(url: str, prompt: list[int], num_tokens: int, under_way: asyncio.Event | None = None) -> list[int]:
    """Token ids as a client sees them, which must be numbered without gap or repetition."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens, "ignore_eos": True}}
    token_ids = []
    async with httpx.AsyncClient(timeout=200) as client, client.stream("POST", f"{url}/generate_stream", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                token = json.loads(line[len("data:"):])["token"]
                assert token["count_output_tokens"] == len(token_ids) + 1
                token_ids.append(token["id"])
                if under_way is not None and len(token_ids) == 10:
                    under_way.set()
    return token_ids


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, tiny_v3: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two-ranks")
    with Served(folder, "--model_dir", str(tiny_v3), "--port", "0", "--tp", "2", "--state_dir", str(folder / "state"),
                "--max_total_token_num", "16384", "--max_req_total_len", "2048", "--chunked_prefill_size", "64") as served:
        yield served


async def test_two_ranks_answer_with_the_tokens_of_transformers(two_ranks: Served, tiny_v3: Path) -> None:
    url = two_ranks.url()
    answers = await asyncio.gather(*(stream(url, prompt, NEW_TOKENS) for prompt in PROMPTS))
    assert answers == greedy(tiny_v3, PROMPTS, NEW_TOKENS)
    status = two_ranks.wait_at_rest()
    (worker,) = status["workers"]  # type: ignore[misc]
    group = worker["group"]
    assert (group["tp"], group["dp"], group["moe_mode"]) == (2, 1, "TP") and [rank["rank"] for rank in group["ranks"]] == [0, 1]
    assert group["ranks"][1]["pid"] == two_ranks.rank(1).pid


def test_a_cancelled_job_leaves_no_page_on_two_ranks(two_ranks: Served) -> None:
    body = {"inputs": [9, 8, 7], "parameters": {"max_new_tokens": 1900, "ignore_eos": True}}
    with httpx.stream("POST", f"{two_ranks.url()}/generate_stream", json=body, timeout=60) as response:
        next(response.iter_lines())
    two_ranks.wait_at_rest()


async def test_no_token_is_lost_or_repeated_when_a_follower_is_killed(two_ranks: Served, tiny_v3: Path) -> None:
    url, number = two_ranks.url(), 80
    two_ranks.wait_ready()
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, prompt, number, under_way)) for prompt in PROMPTS[:4]]
    await under_way.wait()
    two_ranks.rank(1).kill()
    assert await asyncio.gather(*streams) == greedy(tiny_v3, PROMPTS[:4], number)
    assert "rank 1 vanished" in two_ranks.log
    two_ranks.wait_at_rest()
    assert len(await stream(url, [5], 3)) == 3, "the farm answers again"



@pytest.fixture(scope="module")
def two_groups(tmp_path_factory: pytest.TempPathFactory, tiny_v3: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two-groups")
    with Served(folder, "--model_dir", str(tiny_v3), "--port", "0", "--tp", "2", "--dp", "2", "--state_dir", str(folder / "state"),
                "--max_total_token_num", "16384", "--max_req_total_len", "2048", "--chunked_prefill_size", "64", "--worker_id", "w",
                environment={"MOE_MODE": "EP"}) as served:
        yield served


async def test_one_queue_feeds_all_dp_groups_and_experts_are_everywhere(two_groups: Served, tiny_v3: Path) -> None:
    url = two_groups.url()
    prompts = PROMPTS * 2
    answers = await asyncio.gather(*(stream(url, prompt, NEW_TOKENS) for prompt in prompts))
    assert answers == greedy(tiny_v3, PROMPTS, NEW_TOKENS) * 2
    status = two_groups.wait_at_rest()
    workers = sorted(status["workers"], key=lambda worker: worker["worker"])  # type: ignore[call-overload]
    assert [worker["worker"] for worker in workers] == ["w-0", "w-1"] and all(worker["finished"] for worker in workers)
    assert [(worker["group"]["dp_rank"], worker["group"]["ranks"][0]["rank"]) for worker in workers] == [(0, 0), (1, 1)]
    assert len({worker["group"]["generation"] for worker in workers}) == 1


async def test_ranks_without_work_sleep(two_groups: Served) -> None:
    two_groups.url()
    engines = [two_groups.rank(rank) for rank in (0, 1)]
    before = [sum(engine.cpu_times()[:2]) for engine in engines]
    await asyncio.sleep(1.5)
    assert all(sum(engine.cpu_times()[:2]) - was < 0.3 for engine, was in zip(engines, before, strict=True))


@pytest.mark.chaos
async def test_no_token_is_lost_or_repeated_when_a_rank_of_another_dp_group_is_killed(two_groups: Served, tiny_v3: Path) -> None:
    url, number = two_groups.url(), 100
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, prompt, number, under_way)) for prompt in PROMPTS[:6]]
    await under_way.wait()
    two_groups.rank(1).kill()
    assert await asyncio.gather(*streams) == greedy(tiny_v3, PROMPTS[:6], number)
    two_groups.wait_at_rest()


async def test_a_farm_that_stops_lets_all_dp_groups_finish_what_they_have(two_groups: Served) -> None:
    url = two_groups.url()
    two_groups.wait_ready()
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, prompt, 30 + 20 * index, under_way)) for index, prompt in enumerate(PROMPTS[:4])]
    await under_way.wait()
    log = two_groups.log
    for engine in (0, 1):
        two_groups.rank(engine).parent().terminate()  # type: ignore[union-attr]
    assert [len(tokens) for tokens in await asyncio.gather(*streams)] == [30, 50, 70, 90]
    assert "taken over" not in two_groups.log[len(log):]


@pytest.mark.chaos
@pytest.mark.parametrize(("farm", "rank"), [("two_ranks", 1), ("two_groups", 1)], ids=["a follower", "a leader"])
async def test_a_rank_that_is_stopped_is_noticed_by_its_silence(request: pytest.FixtureRequest, tiny_v3: Path, farm: str,
                                                                rank: int) -> None:
    served: Served = request.getfixturevalue(farm)
    url = served.url()
    served.wait_ready()
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, prompt, 100, under_way)) for prompt in PROMPTS[:3]]
    await under_way.wait()
    stopped = served.rank(rank)
    stopped.suspend()
    assert await asyncio.gather(*streams) == greedy(tiny_v3, PROMPTS[:3], 100)
    assert "rank 1 vanished (silent for" in served.log and not stopped.is_running()
    served.wait_at_rest()
