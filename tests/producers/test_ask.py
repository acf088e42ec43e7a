"""One-shot questions over NATS request and reply."""

import asyncio
import json
from typing import Any

import msgpack
import pytest

from coordinator.bus import Bus
from coordinator.messages import FinalRecord, Job, encode_map, pack_ids
from producers import ask
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, answer, run

pytestmark = pytest.mark.services


async def question(bus: Bus, model: str, body: Any, **headers: str) -> tuple[Any, dict[str, str]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = await bus.ask(f"ask.{model}", data, headers={name.replace("_", "-"): value for name, value in headers.items()} or None,
                            timeout_s=20)
    is_json = message.data[:1] == b"{"
    return (json.loads(message.data) if is_json else msgpack.unpackb(message.data)), message.headers


async def test_json_asked_is_answered_with_the_whole_text(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        reply, _ = await question(bus, model, {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    job = worker.jobs[0]
    assert (reply["job_id"], reply["generated_text"], reply["finish_reason"]) == (job.job_id, answer(job.job_id, 5), "length")
    assert job.deadline_ms is not None and job.deadline_ms - job.created_ms == 60_000


async def test_msgpack_asked_is_answered_with_the_final_record(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        body = encode_map({"prompt_ids": pack_ids([72, 105]), "params": {"max_new_tokens": 3}})
        message = await bus.ask(f"ask.{model}", body, timeout_s=20)
    record = FinalRecord.decode(message.data)
    assert record == await bus.get_result(worker.jobs[0].job_id) and record.text == answer(record.job_id, 3)


async def test_headers_name_the_job_its_class_its_tenant_and_its_time(rest: Rest, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        given = {"X_Job_Id": "mine", "X_Job_Class": "interactive", "X_Tenant": "t", "X_Timeout_S": "7"}
        first, _ = await question(bus, model, {"inputs": "Hi"}, **given)
        again, _ = await question(bus, model, {"inputs": "Hi"}, **given)
    (job,) = worker.jobs
    assert first == again and first["job_id"] == job.job_id == "mine"
    assert (job.klass, job.tenant, (job.deadline_ms or 0) - job.created_ms) == ("interactive", "t", 7000)


@pytest.mark.parametrize(("body", "status", "message"), [
    ({"inputs": "Hi", "parameters": {"top_q": 1}}, 400, "top_q: unknown parameter"),
    ({"inputs": "Hi", "parameters": {"n": 2}}, 400, "n: must be 1"),
    ({"inputs": 3}, 400, "inputs: must be a string or a list"),
    ({"prompt": "Hi"}, 400, "prompt: unknown field"),
    (b"{nonsense", 400, "body: not valid JSON"),
    (b"Hi", 400, "not a msgpack message"),
    (encode_map({"text": "Hi", "n": 1}), 400, "n: unknown field"),
    (encode_map({}), 400, "prompt_ids: exactly one of"),
], ids=str)
async def test_a_question_that_cannot_be_honoured_is_refused_by_name(rest: Rest, bus: Bus, model: str, body: Any, status: int,
                                                                     message: str) -> None:
    reply, headers = await question(bus, model, body)
    assert reply["status"] == status and reply["refused"].startswith(message)
    assert headers["Nats-Service-Error-Code"] == str(status) and message in headers["Nats-Service-Error"]


async def test_two_shims_share_the_questions_and_each_is_answered_once(open_rest: OpenRest, bus: Bus, model: str) -> None:
    async with open_rest(), open_rest(), FakeWorker(bus, model) as worker:
        replies = await asyncio.gather(*(question(bus, model, {"inputs": "Hi"}) for _ in range(20)))
    assert {reply["job_id"] for reply, _ in replies} == {job.job_id for job in worker.jobs} and len(worker.jobs) == 20


async def test_more_questions_than_a_shim_holds_are_refused_at_once(rest: Rest, bus: Bus, model: str,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "MAX_OPEN", 1)
    is_taken = asyncio.Event()

    async def wait_for_the_second(worker: FakeWorker, job: Job) -> None:
        is_taken.set()
        refused, _ = await question(bus, model, {"inputs": "Hi"})
        assert refused["status"] == 429
        await worker.emit(job, run(job, 0, 1, finish="stop"))

    async with FakeWorker(bus, model, serve=wait_for_the_second):
        reply, _ = await question(bus, model, {"inputs": "Hi"})
    assert is_taken.is_set() and reply["finish_reason"] == "stop"


async def test_a_job_that_nobody_answers_is_refused_when_its_time_is_over(rest: Rest, bus: Bus, model: str,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "GRACE_S", 0.0)
    reply, _ = await question(bus, model, {"inputs": "Hi"}, X_Timeout_S="0.2")
    assert reply["status"] == 408 and "expired" in reply["refused"]
