"""A batch goes on when its leader goes, and when Redis forgets it; no job is queued twice for it."""

import asyncio
from pathlib import Path

import pytest
import redis

from coordinator.bus import Bus
from coordinator.messages import Job
from tests.producers.conftest import OpenRest
from tests.producers.fake_worker import FakeWorker, all_at_once
from tests.producers.test_batch_api import line, read, submit, wait_over

pytestmark = pytest.mark.services

NUM_LINES = 200


class Gate:
    """Lets a worker answer half of the jobs; the others wait until it opens."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def serve(self, worker: FakeWorker, job: Job) -> None:
        if int(job.job_id.rpartition("-")[2]) >= NUM_LINES // 2:
            await self.opened.wait()
        await all_at_once(worker, job)


async def test_another_shim_goes_on_where_the_leader_stopped(open_rest: OpenRest, tmp_path: Path, bus: Bus, model: str) -> None:
    gate = Gate()
    async with FakeWorker(bus, model, serve=gate.serve) as worker:
        async with open_rest(files_dir=str(tmp_path)) as first:
            batch_id = await submit(first, [line(f"r{i}") for i in range(NUM_LINES)])
            while (await first.http.get(f"/v1/batches/{batch_id}")).json()["request_counts"]["completed"] < NUM_LINES // 2:
                await asyncio.sleep(0.02)
        async with open_rest(files_dir=str(tmp_path)) as second:
            gate.opened.set()
            batch = await wait_over(second, batch_id)
            rows = await read(second, batch["output_file_id"])
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert [row["custom_id"] for row in rows] == [f"r{i}" for i in range(NUM_LINES)]
        assert await bus.last_job_seq() == NUM_LINES, "each job was queued once"
        assert {job.origin for job in worker.jobs} == {batch_id}


async def test_a_batch_that_redis_forgot_is_begun_again_from_what_was_answered(
        open_rest: OpenRest, tmp_path: Path, bus: Bus, model: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producers.batch_runner.ADOPT_S", 0.2)
    monkeypatch.setattr("producers.batch_run.ADOPTED_WAIT_S", 0.2)
    monkeypatch.setattr("producers.batch_runner.RETRY_S", 0.2)
    gate = Gate()
    async with FakeWorker(bus, model, serve=gate.serve) as worker, open_rest(files_dir=str(tmp_path)) as shim:
        batch_id = await submit(shim, [line(f"r{i}") for i in range(NUM_LINES)])
        while (await shim.http.get(f"/v1/batches/{batch_id}")).json()["request_counts"]["completed"] < NUM_LINES // 2:
            await asyncio.sleep(0.02)
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        gate.opened.set()
        while (await shim.http.get(f"/v1/batches/{batch_id}")).status_code == 404:
            await asyncio.sleep(0.02)
        batch = await wait_over(shim, batch_id)
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert [row["custom_id"] for row in await read(shim, batch["output_file_id"])] == [f"r{i}" for i in range(NUM_LINES)]
        assert len({job.job_id for job in worker.jobs}) == NUM_LINES
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        assert (await shim.http.get(f"/v1/batches/{batch_id}")).json()["status"] == "completed", "what is over is kept with its files"


async def test_a_shim_leaves_a_batch_alone_whose_files_it_does_not_have(
        open_rest: OpenRest, tmp_path: Path, bus: Bus, model: str) -> None:
    async with (FakeWorker(bus, model, serve=all_at_once), open_rest(files_dir=str(tmp_path / "b")) as other,
                open_rest(files_dir=str(tmp_path / "a")) as own):
        batch = await wait_over(other, await submit(own, [line("a")]))
        assert batch["status"] == "completed"
        assert (await own.http.get(f"/v1/files/{batch['output_file_id']}")).status_code == 200
        assert (await other.http.get(f"/v1/files/{batch['output_file_id']}")).status_code == 404
