"""The demo model, disaggregated: what a newcomer's first farm says is what transformers says with the same weights."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.system.farm import Farm
from workers.demo_model import fetch_demo

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 64
QUESTIONS = ["What is AI?", "Write a haiku about rivers.", "List three prime numbers and say why they are prime.",
             "Translate to French: the mill grinds the grain.", "def fibonacci(n):"]


@pytest.fixture(scope="module")
def demo_dir() -> Path:
    return fetch_demo(ROOT / "models" / "smollm2-135m-instruct")


@pytest.fixture(scope="module")
def expected(demo_dir: Path) -> list[tuple[list[int], list[int]]]:
    """(prompt ids with the chat template, greedy continuation by transformers in fp32) for each question."""
    tokenizer = AutoTokenizer.from_pretrained(demo_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    pairs = []
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)
        prompt = list(chat["input_ids"])
        with torch.inference_mode():
            whole = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        pairs.append((prompt, whole[0, len(prompt):].tolist()))
    return pairs


@pytest.fixture(scope="module")
def demo_farm(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("demo"), demo_dir, model="demo") as farm:
        farm.worker("prefill", "prefill-1", "--chunked_prefill_size", "24")   # the prompts take two chunks
        farm.worker("decode", "decode-1")
        farm.rest(wait=False)
        farm.wait_ready()
        yield farm


async def test_five_chats_through_prefill_and_decode_processes_equal_transformers(
    demo_farm: Farm, expected: list[tuple[list[int], list[int]]],
) -> None:
    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
        body = {"inputs": prompt, "parameters": {"max_new_tokens": NEW_TOKENS, "return_details": True}}
        return (await client.post(f"{demo_farm.url()}/generate", json=body)).json()  # type: ignore[no-any-return]

    async with httpx.AsyncClient(timeout=300) as client:
        answers = await asyncio.gather(*(ask(client, prompt) for prompt, _ in expected))
    assert [[token["id"] for token in answer["tokens"]] for answer in answers] == [continuation for _, continuation in expected]
    assert "artificial intelligence" in answers[0]["generated_text"][0].lower()
    await demo_farm.wait_at_rest()
