"""Lead one batch from one status to the next until it is over. Each step may be done again by the next leader.

Leading is a lease in Redis with an epoch: a leader that was away learns with its next beat, or its next step, that it leads no more.
"""

import asyncio
import contextlib
import json
import logging
import time

import orjson

from coordinator.batch_store import LAST_STATUSES
from coordinator.errors import Unavailable
from coordinator.store import LEASE_S
from coordinator.tasks import end
from producers.batch_answers import ERRORS, OUTPUT, BatchAnswers, Desk
from producers.batch_check import check_lines
from producers.batch_jobs import BatchJobs
from producers.batches import COMES_FROM, Batch, done_name
from producers.file_store import NoBlob, once

log = logging.getLogger(__name__)

BEAT_S = 0.5
AWAY_S = 0.5
ADOPTED_WAIT_S = 1.5 * LEASE_S
FILE_GONE = {"code": "file_not_found", "line": None, "message": "the input file has been deleted", "param": "input_file_id"}


class LostLead(Exception):
    """Somebody else leads this batch, or its record is gone."""


class BatchRun:
    """Made for one leadership: `run` ends with the batch, or raises LostLead."""

    def __init__(self, desk: Desk, batch: Batch, epoch: int, jobs: BatchJobs) -> None:
        self._desk, self._batch, self._epoch, self._jobs = desk, batch, epoch, jobs
        self._answers = BatchAnswers(desk, batch, jobs)

    async def run(self) -> None:
        await self._jobs.start()
        work, beat = asyncio.create_task(self._work()), asyncio.create_task(self._beat_forever())
        try:
            done, _ = await asyncio.wait((work, beat), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end([work, beat])
            await self._jobs.close()

    async def _work(self) -> None:
        steps = {"validating": self._validate, "in_progress": self._answer, "cancelling": self._cancel, "finalizing": self._finalize}
        status = self._batch.status
        while status not in LAST_STATUSES:
            status = await steps[status]()
        log.info("batch %s: %s", self._batch.id, status)

    async def _validate(self) -> str:
        try:
            total, errors = await check_lines(self._answers.requests(), self._batch.asked.endpoint,
                                              self._desk.shim.settings.max_body_bytes)
        except NoBlob:
            return await self._end("failed", errors=json.dumps([FILE_GONE]))
        if errors:
            return await self._end("failed", total=total, errors=json.dumps(errors))
        return await self._move("in_progress", total=total)

    async def _answer(self) -> str:
        if self._batch.is_adopted:   # jobs that were running when Redis lost its data are asserted by their owners within one lease
            await asyncio.sleep(ADOPTED_WAIT_S)
        try:
            await self._answers.answer_all()
        except NoBlob:
            return await self._end("failed", errors=json.dumps([FILE_GONE]))
        return await self._move("finalizing", is_expired=int(self._answers.stopped_as == "expired"))

    async def _cancel(self) -> str:
        await self._answers.stop("cancelled")
        record = await self._desk.batches.get(self._batch.id)
        if int(record.get("total", 0)):     # else nothing was begun
            with contextlib.suppress(NoBlob):
                await self._answers.answer_all()
        return await self._end_with_files("cancelled")

    async def _finalize(self) -> str:
        record = await self._desk.batches.get(self._batch.id)
        return await self._end_with_files("expired" if record.get("is_expired") == "1" else "completed")

    async def _end_with_files(self, status: str) -> str:
        counters = await self._answers.count_parts()
        file_ids = {"output_file_id": await self._save("output", OUTPUT) if counters["completed"] else "",
                    "error_file_id": await self._save("error", ERRORS) if counters["failed"] else ""}
        ended_as = await self._end(status, **counters, **file_ids)
        if ended_as in LAST_STATUSES:
            await self._answers.forget_parts()
        return ended_as

    async def _save(self, kind: str, mark: bytes) -> str:
        """The id of a file of answers; the same one whoever makes it."""
        file_id = f"file-{self._batch.id.removeprefix('batch_')}-{kind}"
        await self._desk.files.save(file_id, self._answers.answer_lines(mark), filename=f"{self._batch.id}_{kind}.jsonl",
                                    purpose="batch_output", tenant=self._batch.asked.tenant)
        return file_id

    async def _end(self, status: str, **fields: str | int) -> str:
        """The last step, and a note of it where Redis cannot lose it."""
        ended_as = await self._move(status, **fields)
        if ended_as in LAST_STATUSES:
            record = await self._desk.batches.get(self._batch.id)
            await self._desk.files.store.put(done_name(self._batch.id), once(orjson.dumps(record)))
        return ended_as

    async def _move(self, to: str, **fields: str | int) -> str:
        """The status that stands then: `to`, or what somebody else made of the batch."""
        while True:
            try:
                status = await self._desk.batches.move(self._batch.id, COMES_FROM[to], to, epoch=self._epoch, **fields)
            except Unavailable as error:
                log.warning("batch %s: %s", self._batch.id, error)
                await asyncio.sleep(AWAY_S)
                continue
            if not status:
                raise LostLead(self._batch.id)
            return status

    async def _beat_forever(self) -> None:
        while True:
            try:
                status = await self._desk.batches.beat(self._batch.id, self._epoch, self._answers.counters)
            except Unavailable as error:
                log.warning("batch %s: %s", self._batch.id, error)   # nobody else can begin to lead it either
            else:
                if not status:
                    raise LostLead(self._batch.id)
                if status == "cancelling":
                    await self._answers.stop("cancelled")
            if time.time() * 1000 > self._batch.expires_ms:
                await self._answers.stop("expired")
            await asyncio.sleep(BEAT_S)
