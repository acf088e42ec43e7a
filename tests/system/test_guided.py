"""Constrained answers of a whole farm: all validate, disaggregated or not, and when the decode worker is killed on the way."""

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from coordinator.bus import Bus
from coordinator.messages import unpack_tops
from tests.system.conftest import BOTH, PD
from tests.system.farm import Farm
from tests.workers.schemas import random_schema

pytestmark = [pytest.mark.system, pytest.mark.services]

NUM_SCHEMAS, MANY_SCHEMAS = 50, 200
LEASE_S = 1.0
MAX_NEW_TOKENS = 1500


@pytest.fixture(scope="module")
def mortal(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """A disaggregated farm whose decode worker may be killed; jobs go on fast."""
    with Farm(tmp_path_factory.mktemp("mortal"), tiny_v3, model=PD, lease_s=LEASE_S) as farm:
        farm.worker("prefill", "prefill-1")
        farm.worker("decode", "decode-1")
        farm.rest(PD, wait=False)
        farm.wait_ready(PD)
        yield farm


async def generate(client: httpx.AsyncClient, url: str, number: int, **parameters: Any) -> httpx.Response:
    given = {"return_details": True, "do_sample": True, "seed": number, "max_new_tokens": MAX_NEW_TOKENS, **parameters}
    return await client.post(f"{url}/generate", json={"inputs": [7, 11, 13, number], "parameters": given})


def schemas(count: int) -> list[dict[str, Any]]:
    rng = random.Random(11)
    return [random_schema(rng, depth=1) for _ in range(count)]


def check(reply: httpx.Response, schema: dict[str, Any]) -> list[int]:
    """Its token ids, once its text was found to validate."""
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["finish_reason"] == "stop", body["generated_text"]
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(body["generated_text"][0]))
    return [token["id"] for token in body["tokens"]]


@pytest.mark.parametrize("count", [NUM_SCHEMAS, pytest.param(MANY_SCHEMAS, marks=pytest.mark.chaos)])
async def test_answers_to_random_schemas_validate_and_disaggregated_ones_are_the_same(farm: Farm, count: int) -> None:
    given = schemas(count)
    async with httpx.AsyncClient(timeout=250) as client:
        pd, both = [await asyncio.gather(*(generate(client, farm.url(name), number, guided_json=schema)
                                           for number, schema in enumerate(given))) for name in (PD, BOTH)]
    for schema, ours, alone in zip(given, pd, both, strict=True):
        assert check(ours, schema) == check(alone, schema)


@pytest.mark.chaos
async def test_answers_to_many_schemas_validate_though_the_decode_worker_is_killed_again_and_again(farm: Farm, mortal: Farm) -> None:
    """Each kill comes when a quarter more of the answers are there; the rest is somewhere between prompt and last token."""
    given = schemas(MANY_SCHEMAS)
    num_kills = 0
    async with httpx.AsyncClient(timeout=250, limits=httpx.Limits(max_connections=MANY_SCHEMAS)) as client:
        tasks = [asyncio.create_task(generate(client, mortal.url(PD), number, guided_json=schema)) for number, schema in enumerate(given)]
        for num_done in (MANY_SCHEMAS // 4, MANY_SCHEMAS // 2, 3 * MANY_SCHEMAS // 4):
            while sum(task.done() for task in tasks) < num_done:
                await asyncio.sleep(0.01)
            num_open = sum(not task.done() for task in tasks)
            [name] = [name for name in mortal.processes if name.startswith("decode")]
            mortal.processes.pop(name).kill()
            num_kills += 1
            mortal.worker("decode", f"decode-again-{num_kills}")
            assert num_open > 0, "somebody was in the middle"
        resumed = await asyncio.gather(*tasks)
        whole = await asyncio.gather(*(generate(client, farm.url(BOTH), number, guided_json=schema) for number, schema in enumerate(given)))
    for schema, ours, alone in zip(given, resumed, whole, strict=True):
        assert check(ours, schema) == check(alone, schema)
    print(f"{len(resumed)} answers validate after {num_kills} kills")
    await mortal.wait_at_rest(model=PD)


async def test_answers_still_validate_when_the_decode_worker_is_killed_in_the_middle(mortal: Farm) -> None:
    long = {"type": "object", "properties": {"text": {"type": "string", "minLength": 400, "maxLength": 420}}, "required": ["text"]}
    async with httpx.AsyncClient(timeout=120) as client:
        whole = [check(await generate(client, mortal.url(PD), number, guided_json=json.dumps(long)), long) for number in range(2)]
        asked = [asyncio.create_task(generate(client, mortal.url(PD), number, guided_json=json.dumps(long))) for number in range(2)]
        shown = asyncio.create_task(_until_shown(client, mortal.url(PD), 50, guided_json=long, seed=1))
        await shown
        mortal.processes["decode-1"].kill()
        assert not any(task.done() for task in asked), "they were in the middle"
        mortal.worker("decode", "decode-2")
        again = [check(reply, long) for reply in await asyncio.gather(*asked)]
    assert again == whole, "gone on with as if nothing had been"
    mortal.processes.pop("decode-1")
    await mortal.wait_at_rest(model=PD)


async def _until_shown(client: httpx.AsyncClient, url: str, num_tokens: int, **parameters: Any) -> None:
    """Returns when that many tokens of an answer of its own have been seen."""
    given = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, **parameters}
    async with client.stream("POST", f"{url}/generate_stream", json={"inputs": [7, 11, 13, 5], "parameters": given}) as response:
        async for line in response.aiter_lines():
            num_tokens -= line.startswith("data:")
            if num_tokens <= 0:
                return


@pytest.mark.parametrize("name", [PD, BOTH])
@pytest.mark.parametrize(("given", "field"), [
    ({"guided_json": "{"}, "guided_json"), ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
    ({"regular_constraint": "a", "ignore_eos": True}, "ignore_eos"), ({"top_logprobs": 21}, "top_logprobs"),
])
async def test_what_can_be_seen_to_be_wrong_is_refused_at_the_door(farm: Farm, name: str, given: dict[str, Any], field: str) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        reply = await generate(client, farm.url(name), 1, **given)
    assert reply.status_code in (400, 422) and field in reply.text


@pytest.mark.parametrize("name", [PD, BOTH])
async def test_a_grammar_that_does_not_compile_ends_its_job_with_the_field_named(farm: Farm, name: str) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        reply = await generate(client, farm.url(name), 1, guided_grammar="root ::= (")
    assert reply.status_code != 200 and "guided_grammar: does not compile" in reply.text
    await farm.wait_at_rest(model=name)


async def test_the_likeliest_tokens_stand_in_the_final_record_across_the_hand_over(farm: Farm) -> None:
    tops = []
    async with httpx.AsyncClient(timeout=60) as client, await Bus.connect(farm.services.nats_url, "test") as bus:
        for name in (PD, BOTH):
            reply = await generate(client, farm.url(name), 3, top_logprobs=4, max_new_tokens=9, do_sample=False)
            while (record := await bus.get_result(reply.headers["X-Job-Id"])) is None:
                await asyncio.sleep(0.01)
            tops.append(unpack_tops(record.top_logprobs))
            assert [token["id"] for token in reply.json()["tokens"]] == [top[0][0] for top in tops[-1]]
    assert [len(top) for top in tops[0]] == [4] * 9
    assert [[token_id for token_id, _ in top] for top in tops[0]] == [[token_id for token_id, _ in top] for top in tops[1]]
