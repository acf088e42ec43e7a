"""What a farm answers: the same tokens as transformers, disaggregated or not, however the request is cut up."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from coordinator.bus import Bus
from coordinator.messages import FinalRecord
from tests.system.conftest import BOTH, PD
from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

PROMPTS = [[7, 11, 13], list(range(20, 90)), [300] * 33, list(range(5, 200)), [400, 3, 3, 9], list(range(100, 116)), [50],
           list(range(9, 140, 2))]
NEW_TOKENS = 64


async def generate(url: str, inputs: str | list[int], **parameters: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=120) as client:
        reply = await client.post(f"{url}/generate", json={"inputs": inputs, "parameters": {"return_details": True, **parameters}})
    assert reply.status_code == 200, reply.text
    return {**reply.json(), "job_id": reply.headers["X-Job-Id"]}


def ids(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["tokens"]]


@pytest.fixture(scope="module")
def expected(tiny_v3: Path) -> list[list[int]]:
    """Greedy continuations by transformers, fp32, the same weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_v3, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # 64 tokens whatever comes
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        return [model.generate(torch.tensor([p]), generation_config=config)[0, len(p):].tolist() for p in PROMPTS]


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_eight_prompts_at_once_give_the_tokens_of_transformers(farm: Farm, expected: list[list[int]], name: str) -> None:
    url = farm.url(name)
    answers = await asyncio.gather(*(generate(url, p, max_new_tokens=NEW_TOKENS, ignore_eos=True) for p in PROMPTS))
    assert [ids(answer) for answer in answers] == expected
    again = await generate(url, PROMPTS[3], max_new_tokens=NEW_TOKENS, ignore_eos=True)  # its prompt is in the prefix cache now
    assert ids(again) == expected[3]


async def final_record(farm: Farm, job_id: str) -> FinalRecord:
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        while (record := await bus.get_result(job_id)) is None:
            await asyncio.sleep(0.01)
        return record


async def test_the_final_record_names_a_prefill_and_a_decode_worker(farm: Farm) -> None:
    answer = await generate(farm.url(PD), [1, 2, 3], max_new_tokens=8, ignore_eos=True)
    record = await final_record(farm, answer["job_id"])
    assert [owner.partition(".")[0] for owner in record.workers] == ["prefill-1", "decode-1"]
    assert record.text == answer["generated_text"][0] and record.reason == "length"


SAMPLED: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0.8, "seed": 5},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.8, "top_k": 40, "seed": 2**63},
    {"do_sample": True, "min_p": 0.05, "seed": 1, "repetition_penalty": 1.2},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.3, "input_penalty": True},
    {"exponential_decay_length_penalty": [4, 1.05]},
    {"allowed_token_ids": [5, 6, 7, 8, 200]},
    {"min_new_tokens": 20, "ignore_eos": False},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"skip_special_tokens": False, "print_eos_token": True},
]


@pytest.mark.parametrize("parameters", SAMPLED, ids=[json.dumps(p)[:50] for p in SAMPLED])
async def test_disaggregated_output_equals_colocated_output(farm: Farm, parameters: dict[str, Any]) -> None:
    given = {"max_new_tokens": 40, **parameters}
    pd, both = await asyncio.gather(generate(farm.url(PD), PROMPTS[1], **given), generate(farm.url(BOTH), PROMPTS[1], **given))
    assert ids(pd) == ids(both)
    assert pd["generated_text"] == both["generated_text"] and pd["finish_reason"] == both["finish_reason"]
    assert [t["logprob"] for t in pd["tokens"]] == pytest.approx([t["logprob"] for t in both["tokens"]], abs=1e-4)


async def test_the_same_seed_gives_the_same_text_and_another_seed_another(farm: Farm) -> None:
    drawn = [await generate(farm.url(PD), PROMPTS[0], do_sample=True, seed=seed, max_new_tokens=24) for seed in (1, 1, 2)]
    assert ids(drawn[0]) == ids(drawn[1]) != ids(drawn[2])


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_an_end_token_that_comes_first_ends_the_job_before_any_hand_over(farm: Farm, name: str, tiny_v3: Path) -> None:
    eos = json.loads((tiny_v3 / "generation_config.json").read_text())["eos_token_id"]
    eos = eos if isinstance(eos, int) else eos[0]
    answer = await generate(farm.url(name), PROMPTS[0], allowed_token_ids=[eos], max_new_tokens=10)
    assert (ids(answer), answer["finish_reason"], answer["generated_text"]) == ([eos], "stop", [""])
    record = await final_record(farm, answer["job_id"])
    assert len(record.workers) == 1


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_a_stop_string_across_token_borders_ends_the_text_before_it(farm: Farm, name: str) -> None:
    free = await generate(farm.url(name), PROMPTS[1], max_new_tokens=40, ignore_eos=True)
    text = free["generated_text"][0]
    pieces = [t["text"] for t in free["tokens"]]
    border = len("".join(pieces[:10]))                     # a stop string that begins in one token and ends in another
    stop = text[border - 1 : border + 2]
    answer = await generate(farm.url(name), PROMPTS[1], max_new_tokens=40, ignore_eos=True, stop_sequences=[stop])
    assert answer["generated_text"] == [text[: text.index(stop)]]
    assert answer["finish_reason"] == "stop" and answer["count_output_tokens"] < 40


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_a_stop_sequence_given_as_token_ids_stops_behind_it(farm: Farm, name: str) -> None:
    free = ids(await generate(farm.url(name), PROMPTS[1], max_new_tokens=12, ignore_eos=True))
    answer = await generate(farm.url(name), PROMPTS[1], max_new_tokens=12, ignore_eos=True, stop_sequences=[free[4:6]])
    assert ids(answer) == free[: free.index(free[5], 4) + 1] and answer["finish_reason"] == "stop"


async def test_several_answers_to_one_prompt_come_as_lists(farm: Farm) -> None:
    answer = await generate(farm.url(PD), PROMPTS[0], n=3, do_sample=True, seed=9, max_new_tokens=6, ignore_eos=True)
    assert len(answer["generated_text"]) == 3 and len(set(answer["generated_text"])) > 1
    assert answer["count_output_tokens"] == [6, 6, 6]


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_nothing_is_held_after_the_answers(farm: Farm, name: str) -> None:
    await asyncio.gather(*(generate(farm.url(name), p, max_new_tokens=5) for p in PROMPTS))
    await farm.wait_at_rest(model=name)
