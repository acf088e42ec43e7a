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
NEW_TOKENS = 40


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
    url, number = two_ranks.url(), 120
    two_ranks.wait_ready()
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, prompt, number, under_way)) for prompt in PROMPTS[:4]]
    await under_way.wait()
    two_ranks.rank(1).kill()
    assert await asyncio.gather(*streams) == greedy(tiny_v3, PROMPTS[:4], number)
    assert "rank 1 vanished" in two_ranks.log
    two_ranks.wait_at_rest()
    assert len(await stream(url, [5], 3)) == 3, "the farm answers again"

