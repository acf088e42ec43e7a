"""Files and batches over REST, answered by a stand-in for a worker: shapes, statuses, counts, refusals."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.bus import Bus
from coordinator.messages import Job
from coordinator.tasks import end
from tests.producers.conftest import OpenRest, Rest
from tests.producers.fake_worker import FakeWorker, all_at_once, answer, run

pytestmark = pytest.mark.services

LAST = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    body = {"inputs": [5, 6, 7], "parameters": {"max_new_tokens": 3}}
    return {"custom_id": custom_id, "method": "POST", "url": "/generate", "body": body, **changes}


def bad_line(custom_id: str) -> dict[str, Any]:
    return line(custom_id, body={"inputs": [5], "parameters": {"temperature": -1}})


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


async def upload(rest: Rest, content: bytes, **fields: str) -> httpx.Response:
    return await rest.http.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch", **fields})


async def submit(rest: Rest, rows: Iterable[dict[str, Any]], endpoint: str = "/generate") -> str:
    file = (await upload(rest, jsonl(rows))).json()
    reply = await rest.post("/v1/batches", {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"})
    assert reply.status_code == 200, reply.text
    batch_id: str = reply.json()["id"]
    return batch_id


async def wait_over(rest: Rest, batch_id: str) -> dict[str, Any]:
    while (batch := (await rest.http.get(f"/v1/batches/{batch_id}")).json())["status"] not in LAST:
        await asyncio.sleep(0.02)
    shown: dict[str, Any] = batch
    return shown


async def read(rest: Rest, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(row) for row in (await rest.http.get(f"/v1/files/{file_id}/content")).text.splitlines()]


@pytest.fixture
async def shim(open_rest: OpenRest, tmp_path: Path) -> AsyncIterator[Rest]:
    async with open_rest(files_dir=str(tmp_path / "files")) as opened:
        yield opened


@pytest.fixture
async def worker(bus: Bus, model: str) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(bus, model, serve=all_at_once) as fake:
        yield fake


async def test_every_line_is_answered_once_in_the_order_of_the_input(shim: Rest, worker: FakeWorker) -> None:
    batch_id = await submit(shim, [line(f"r{i}") for i in range(150)])
    batch = await wait_over(shim, batch_id)
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 150, "completed": 150, "failed": 0})
    assert batch["usage"]["output_tokens"] == 450 and batch["usage"]["input_tokens"] == 450
    assert batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"] and batch["error_file_id"] is None
    rows = await read(shim, batch["output_file_id"])
    assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(150)]
    assert rows[7]["response"]["status_code"] == 200 and rows[7]["error"] is None
    assert rows[7]["response"]["body"]["generated_text"] == [answer(f"{batch_id}-7", 3)]
    assert {job.klass for job in worker.jobs} == {"batch"} and len({job.job_id for job in worker.jobs}) == len(worker.jobs) == 150


async def test_a_line_that_its_endpoint_would_refuse_goes_to_the_error_file(shim: Rest, worker: FakeWorker) -> None:
    batch = await wait_over(shim, await submit(shim, [line("a"), bad_line("b"), line("c")]))
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 3, "completed": 2, "failed": 1})
    assert [row["custom_id"] for row in await read(shim, batch["output_file_id"])] == ["a", "c"]
    (bad,) = await read(shim, batch["error_file_id"])
    assert bad["custom_id"] == "b" and bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["message"].startswith("temperature: ")


async def test_lines_for_openais_endpoints_are_checked_and_answered_as_there(shim: Rest, worker: FakeWorker, model: str) -> None:
    bodies = {"ok": {}, "two": {"n": 2, "max_tokens": 2}, "stream": {"stream": True}, "other": {"model": "gpt-4"}, "odd": {"colour": 1}}
    rows = [{"custom_id": name, "method": "POST", "url": "/v1/completions",
             "body": {"model": model, "prompt": "hi", "max_tokens": 3, **change}} for name, change in bodies.items()]
    batch_id = await submit(shim, rows, "/v1/completions")
    batch = await wait_over(shim, batch_id)
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    ok, two = [row["response"]["body"] for row in await read(shim, batch["output_file_id"])]
    assert ok["object"] == "text_completion" and ok["choices"][0]["text"] == answer(f"{batch_id}-0", 3)
    assert [choice["text"] for choice in two["choices"]] == [answer(f"{batch_id}-1-{i}", 2) for i in range(2)]
    assert batch["usage"]["input_tokens"] == ok["usage"]["prompt_tokens"] + two["usage"]["prompt_tokens"]
    errors = {row["custom_id"]: row["response"] for row in await read(shim, batch["error_file_id"])}
    assert {name: (said["status_code"], said["body"]["error"]["param"]) for name, said in errors.items()} == {
        "stream": (400, "stream"), "other": (404, None), "odd": (400, "colour")}


@pytest.mark.parametrize(("rows", "code", "number"), [
    (b'{"custom_id": "a"\n', "invalid_json_line", 1),
    (jsonl([line("a"), line("b"), line("a")]), "duplicate_custom_id", 3),
    (jsonl([line("a"), line("b", url="/v1/embeddings")]), "mismatched_endpoint", 2),
    (jsonl([line("a", method="GET")]), "invalid_method", 1),
    (jsonl([line("")]), "missing_required_parameter", 1),
    (b"\n" + jsonl([line("a", priority=1)]), "invalid_request", 2),
    (b"\n\n", "empty_file", None),
])
async def test_a_file_that_is_no_batch_fails_and_says_which_line(
        shim: Rest, worker: FakeWorker, rows: bytes, code: str, number: int | None) -> None:
    file = (await upload(shim, rows)).json()
    created = (await shim.post("/v1/batches", {"input_file_id": file["id"], "endpoint": "/generate", "completion_window": "24h"})).json()
    assert created["status"] in ("validating", "failed")
    batch = await wait_over(shim, created["id"])
    assert batch["status"] == "failed" and batch["failed_at"] and batch["output_file_id"] is None
    assert (batch["errors"]["data"][0]["code"], batch["errors"]["data"][0]["line"]) == (code, number)
    assert not worker.jobs


async def test_a_cancelled_batch_keeps_what_was_answered(shim: Rest, bus: Bus, model: str) -> None:
    async def first_ten(worker: FakeWorker, job: Job) -> None:
        if int(job.job_id.rpartition("-")[2]) < 10:
            await all_at_once(worker, job)
            return
        while await worker.cancelled.get() != job.job_id:
            pass
        await worker.emit(job, run(job, 0, 0, finish="cancelled"))

    async with FakeWorker(bus, model, serve=first_ten):
        batch_id = await submit(shim, [line(f"r{i}") for i in range(11)])
        while (await shim.http.get(f"/v1/batches/{batch_id}")).json()["request_counts"]["completed"] < 10:
            await asyncio.sleep(0.02)
        for _ in range(2):
            said = await shim.http.post(f"/v1/batches/{batch_id}/cancel")
            assert said.status_code == 200 and said.json()["status"] in ("cancelling", "cancelled")
        batch = await wait_over(shim, batch_id)
    assert (batch["status"], batch["request_counts"]) == ("cancelled", {"total": 11, "completed": 10, "failed": 1})
    assert len(await read(shim, batch["output_file_id"])) == 10
    assert [row["error"]["code"] for row in await read(shim, batch["error_file_id"])] == ["batch_cancelled"]
    assert (await shim.http.post(f"/v1/batches/{batch_id}/cancel")).status_code == 200


async def test_a_batch_past_its_window_keeps_what_was_answered_and_expires(
        shim: Rest, bus: Bus, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producers.batch_runner.WINDOW_S", 1.0)

    async def only_the_first(worker: FakeWorker, job: Job) -> None:
        if job.job_id.endswith("-0"):
            await all_at_once(worker, job)
        else:
            assert job.deadline_ms is not None
            await worker.cancelled.get()
            await worker.emit(job, run(job, 0, 0, finish="expired"))

    async with FakeWorker(bus, model, serve=only_the_first):
        batch = await wait_over(shim, await submit(shim, [line("a"), line("b")]))
    assert (batch["status"], batch["request_counts"]) == ("expired", {"total": 2, "completed": 1, "failed": 1})
    assert [row["error"]["code"] for row in await read(shim, batch["error_file_id"])] == ["batch_expired"]


async def test_the_same_idempotency_key_is_the_same_batch(shim: Rest, worker: FakeWorker) -> None:
    file = (await upload(shim, jsonl([line("a")]))).json()
    asked = {"input_file_id": file["id"], "endpoint": "/generate", "completion_window": "24h"}
    first, second = [await shim.http.post("/v1/batches", json=asked, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert first.json()["id"] == second.json()["id"]
    other = await shim.http.post("/v1/batches", json={**asked, "metadata": {"x": "y"}}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409
    await wait_over(shim, first.json()["id"])
    assert len(worker.jobs) == 1


@pytest.mark.parametrize(("change", "field"), [
    ({"completion_window": "1h"}, "completion_window"), ({"endpoint": "/v1/embeddings"}, "endpoint"),
    ({"input_file_id": 3}, "input_file_id"), ({"metadata": {"a": 1}}, "metadata"), ({"output_expires_after": {}}, "output_expires_after")])
async def test_what_cannot_be_honoured_is_refused_by_name(shim: Rest, change: dict[str, Any], field: str) -> None:
    file = (await upload(shim, jsonl([line("a")]))).json()
    asked = {"input_file_id": file["id"], "endpoint": "/generate", "completion_window": "24h", **change}
    reply = await shim.post("/v1/batches", asked)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field, reply.text


async def test_files_are_listed_read_and_deleted(shim: Rest) -> None:
    content = jsonl([line("a")])
    file = (await upload(shim, content)).json()
    assert (file["object"], file["bytes"], file["filename"], file["purpose"]) == ("file", len(content), "in.jsonl", "batch")
    assert (await shim.http.get(f"/v1/files/{file['id']}")).json() == file
    assert (await shim.http.get(f"/v1/files/{file['id']}/content")).content == content
    assert [row["id"] for row in (await shim.http.get("/v1/files")).json()["data"]] == [file["id"]]
    assert (await shim.http.get("/v1/files", headers={"X-Tenant": "other"})).json()["data"] == []
    assert (await shim.http.get(f"/v1/files/{file['id']}", headers={"X-Tenant": "other"})).status_code == 404
    assert (await shim.http.delete(f"/v1/files/{file['id']}")).json() == {"id": file["id"], "object": "file", "deleted": True}
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content", "/v1/files/..%2Fx", "/v1/batches/batch_0"):
        assert (await shim.http.get(path)).status_code == 404, path


async def test_an_upload_says_what_is_wrong_with_it(shim: Rest) -> None:
    assert (await upload(shim, b"", purpose="fine-tune")).json()["error"]["param"] == "purpose"
    assert (await upload(shim, b"", expires_after="1")).json()["error"]["param"] == "expires_after"
    assert (await shim.http.post("/v1/files", data={"purpose": "batch"}, files={"x": b""})).json()["error"]["param"] == "x"


async def test_batches_are_listed_newest_first_a_page_at_a_time(shim: Rest, worker: FakeWorker) -> None:
    ids = [await submit(shim, [line("a")]) for _ in range(3)]
    page = (await shim.http.get("/v1/batches", params={"limit": 2})).json()
    assert [row["id"] for row in page["data"]] == [ids[2], ids[1]] and page["has_more"]
    rest = (await shim.http.get("/v1/batches", params={"limit": 2, "after": page["last_id"]})).json()
    assert [row["id"] for row in rest["data"]] == [ids[0]] and not rest["has_more"]


async def test_a_full_queue_makes_a_batch_wait_and_loses_nothing(open_rest: OpenRest, tmp_path: Path, bus: Bus, model: str) -> None:
    async with (open_rest(files_dir=str(tmp_path), max_queued_tokens=20) as shim, FakeWorker(bus, model, serve=all_at_once) as worker):
        finished = asyncio.create_task(_finish_all(shim, worker))
        batch = await wait_over(shim, await submit(shim, [line(f"r{i}") for i in range(9)]))
        await end([finished])
    assert batch["request_counts"] == {"total": 9, "completed": 9, "failed": 0}


async def _finish_all(shim: Rest, worker: FakeWorker) -> None:
    """What a worker does in Redis at the end of a job, and the stand-in does not."""
    store = shim.app.state.shim.client.store
    while True:
        for job in list(worker.jobs):
            await store.finish("fake.1", job.job_id)
        await asyncio.sleep(0.02)


async def test_without_a_folder_for_files_it_says_so(rest: Rest) -> None:
    reply = await rest.http.get("/v1/files")
    assert reply.status_code == 501 and "--files_dir" in reply.json()["error"]["message"]
