"""Whatever is sent, the sender gets a clear error, the farm goes on and nothing is held."""

import asyncio
import json
import random

import httpx
import msgpack
import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.messages import Frame, Job, encode_map, new_job_id
from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient
from tests.system.conftest import PD
from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

GARBAGE = [b"", b"\x00", b"not msgpack", msgpack.packb({"v": 9}), msgpack.packb([1, 2]), encode_map({"text": "x"}), b"\x81" * 4000,
           encode_map({"job_id": "a.b", "origin": "o", "model": PD, "text": "x"})]


async def assert_answers(farm: Farm) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"inputs": [1, 2], "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
        reply = await client.post(f"{farm.url(PD)}/generate", json=body)
    assert reply.status_code == 200 and reply.json()["count_output_tokens"] == 3


@pytest.mark.parametrize(("body", "status", "field"), [
    (b"{", 400, "body"), (b"\xff\xfe", 400, "body"), (b"[]", 400, "body"), (b'{"parameters": {}}', 400, "inputs"),
    (b'{"inputs": ""}', 400, "inputs"), (b'{"inputs": []}', 400, "inputs"), (b'{"inputs": [512]}', 400, "inputs"),
    (b'{"inputs": "x", "parameters": {"top_q": 1}}', 400, "top_q"), (b'{"inputs": "x", "parameters": {"top_p": 2}}', 400, "top_p"),
    (b'{"inputs": "x", "parameters": {"max_new_tokens": 5000}}', 400, "max_new_tokens"),
    (b'{"inputs": "x", "parameters": {"guided_json": "{"}}', 400, "guided_json"), (b'{"inputs": "x", "prio": 1}', 400, "prio"),
    (b'{"inputs": "' + b"a" * 10_000_000 + b'"}', 413, "body"),
])
async def test_a_bad_request_is_refused_with_the_name_of_its_field(farm: Farm, body: bytes, status: int, field: str) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        reply = await client.post(f"{farm.url(PD)}/generate", content=body)
    assert reply.status_code == status and field in reply.json()["message"], reply.text
    await assert_answers(farm)


async def test_garbage_published_straight_to_jobs_becomes_a_dead_letter_with_its_reason(farm: Farm) -> None:
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        before = {seq for seq, _ in await bus.dlq_list(PD)}
        for data in GARBAGE:
            await bus.store(subjects.jobs(PD, "normal"), data, {}, 5.0)
        while (await bus.counters(PD))["dlq"] < len(before) + len(GARBAGE):
            await asyncio.sleep(0.02)
        letters = [letter for seq, letter in await bus.dlq_list(PD) if seq not in before]
    assert sorted(letter.payload for letter in letters) == sorted(GARBAGE)
    assert all(letter.reason for letter in letters)
    await assert_answers(farm)
    await farm.wait_at_rest(model=PD)


async def test_a_job_that_cannot_be_honoured_ends_with_an_error_its_sender_can_read(farm: Farm) -> None:
    job_id = new_job_id()
    body = encode_map({"job_id": job_id, "origin": "someone", "model": PD, "text": "x", "params": {"temperature": -5}})
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        await bus.store(subjects.jobs(PD, "normal"), body, {}, 5.0)
        while (record := await bus.get_result(job_id)) is None:
            await asyncio.sleep(0.02)
    assert record.reason == "error" and record.error.startswith("temperature: ")
    await farm.wait_at_rest(model=PD)


async def test_a_worker_refuses_what_a_shim_would_have_refused(farm: Farm) -> None:
    """Jobs that were published directly, past every check of a shim."""
    async with await TokenmillClient.connect(farm.services.nats_url, model=PD) as client:
        for prompt, params, field in (([5, 511, 512], SamplingParams(), "prompt_ids"), ([1] * 3000, SamplingParams(), "prompt_ids"),
                                      ([1], SamplingParams(max_new_tokens=10**9), "max_new_tokens")):
            handle = await client.submit(prompt, params)
            result = await handle.result()
            assert result.reason == "error" and field in result.error
    await farm.wait_at_rest(model=PD)


async def test_garbage_on_every_other_subject_changes_nothing(farm: Farm) -> None:
    drawn = random.Random(4)
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        workers = (await farm.status())["workers"]
        kv = [subjects.kv(w["worker"], w["incarnation"]) for w in workers]
        for data in [*GARBAGE, *(drawn.randbytes(drawn.randrange(300)) for _ in range(50))]:
            for subject in (*kv, "cancel.x", f"cancel.{new_job_id()}", "live.o.w.1"):
                await bus.publish(subject, data)
            await bus.store(subjects.handoff(PD), data, {}, 5.0)
        for wrong in ({"op": "release"}, {"op": 5, "job_id": [], "epoch": {}, "generation": "x"}):
            for subject in kv:
                await bus.publish(subject, encode_map(wrong))
        await bus.flush()
    await assert_answers(farm)
    await farm.wait_at_rest(model=PD)


async def test_a_stranger_on_our_live_subject_cannot_end_our_stream(farm: Farm) -> None:
    async with await TokenmillClient.connect(farm.services.nats_url, model=PD) as client:
        handle = await client.submit([3, 4, 5], SamplingParams(max_new_tokens=20, ignore_eos=True))
        async with await Bus.connect(farm.services.nats_url, "stranger") as bus:
            for data in (b"\xc1", Frame(tombstone="x.1").encode(), json.dumps({"a": 1}).encode()):
                await bus.publish(f"live.{client.origin}.x.1", data)
        tokens = [token.index async for token in handle.stream()]
    assert tokens == list(range(20))


def test_jobs_are_named_without_characters_that_subjects_give_a_meaning() -> None:
    assert Job.decode(Job(job_id=new_job_id(), origin="o", model="m", text="x").encode()).job_id.replace("-", "").isalnum()
