"""Answer the lines of one batch, a part at a time, and make files of the parts.

A part is written once, when all its lines are answered. A leader that dies loses the parts it was filling, not their jobs: the next one
finds their results. A former leader that lives on changes nothing a reader will see: the part that was written first stands.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import orjson

from coordinator.batch_store import BatchStore
from coordinator.errors import InvalidField, JobFailed, PayloadTooLarge, TokenmillError
from coordinator.messages import FinalRecord
from producers import batch_lines
from producers.batch_endpoints import Endpoints, Plan, jobs_of, refusal
from producers.batch_files import Files
from producers.batch_jobs import BatchJobs, Stopped
from producers.batch_lines import Answer, Line, Part, Request
from producers.batches import COUNTERS, Batch
from producers.file_store import lines, once
from producers.job_handle import as_result
from producers.openai_errors import ModelNotFound
from producers.shim import Shim

MAX_OPEN_PARTS = 16                     # a slow line keeps its part open: the others go on
MAX_OPEN_BYTES = 32 * 1024 * 1024       # of input, in open parts
OUTPUT, ERRORS = b"+", b"-"
WHY_UNANSWERED = {"cancelled": ("batch_cancelled", "This request was not answered before the batch was cancelled."),
                  "expired": ("batch_expired", "This request could not be executed before the completion window expired.")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What all batches of one shim share. `window` bounds the lines whose jobs are open at once."""

    shim: Shim
    endpoints: Endpoints
    files: Files
    batches: BatchStore
    window: asyncio.Semaphore


class BatchAnswers:
    """`counters` grow line by line; after `answer_all` they are those of the parts."""

    def __init__(self, desk: Desk, batch: Batch, jobs: BatchJobs) -> None:
        self._desk, self._batch, self._jobs = desk, batch, jobs
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.stopped_as = ""                # key of WHY_UNANSWERED, once it takes no more work
        self._open_parts = self._open_bytes = 0
        self._part_ended = asyncio.Event()

    async def stop(self, stopped_as: str) -> None:
        """Take no more work. Lines that are not answered by now say why."""
        self.stopped_as = self.stopped_as or stopped_as
        await self._jobs.stop()

    def requests(self) -> AsyncIterator[Line]:
        """The lines of the input file. Raises NoBlob."""
        return batch_lines.requests(lines(self._desk.files.store.get(self._batch.asked.input_file_id), self._max_line_bytes))

    async def answer_all(self) -> None:
        """Until every line has its answer in some part. Raises NoBlob when the input file is gone."""
        self.counters = await self.count_parts()
        done = {batch_lines.part_number(name) for name in await self._part_names()}
        try:
            async with asyncio.TaskGroup() as group:
                async for part in batch_lines.parts(self.requests()):
                    if part.number not in done:
                        await self._wait_for_room()
                        self._open_parts += 1
                        self._open_bytes += part.size_bytes
                        group.create_task(self._answer_part(part))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def count_parts(self) -> dict[str, int]:
        """The counters of what is answered, from the headers of the parts."""
        counters = dict.fromkeys(COUNTERS, 0)
        for name in await self._part_names():
            async for header in lines(self._desk.files.store.get(name), self._max_line_bytes):
                for counter, value in orjson.loads(header).items():
                    counters[counter] += value
                break
        return counters

    def answer_lines(self, mark: bytes) -> AsyncIterator[bytes]:
        """All answers for the output file, or for the error file, in the order of the input."""
        async def found() -> AsyncIterator[bytes]:
            for name in await self._part_names():
                kept = [line[1:] + b"\n" async for line in lines(self._desk.files.store.get(name), 1 << 62) if line[:1] == mark]
                if kept:
                    yield b"".join(kept)

        return found()

    async def forget_parts(self) -> None:
        for name in await self._part_names():
            await self._desk.files.store.delete(name)

    async def _part_names(self) -> list[str]:
        return await self._desk.files.store.names(batch_lines.part_prefix(self._batch.id))

    async def _wait_for_room(self) -> None:
        while self._open_parts and (self._open_parts >= MAX_OPEN_PARTS or self._open_bytes >= MAX_OPEN_BYTES):
            self._part_ended.clear()
            await self._part_ended.wait()

    async def _answer_part(self, part: Part) -> None:
        answers = await asyncio.gather(*map(self._answer_line, part.lines))
        await self._desk.files.store.put(batch_lines.part_name(self._batch.id, part.number), once(batch_lines.encode_part(answers)))
        self._open_parts -= 1
        self._open_bytes -= part.size_bytes
        self._part_ended.set()

    async def _answer_line(self, line: Line) -> Answer:
        async with self._desk.window:
            answer = await self._answer(batch_lines.read_request(line, self._batch.asked.endpoint, self._max_line_bytes))
        self.counters["completed" if answer.is_ok else "failed"] += 1
        self.counters["input_tokens"] += answer.input_tokens
        self.counters["output_tokens"] += answer.output_tokens
        return answer

    async def _answer(self, request: Request) -> Answer:
        request_id = f"{self._batch.id}-{request.index}"
        shim, batch = self._desk.shim, self._batch
        try:
            plan = await self._desk.endpoints.plan(batch.asked.endpoint, request.body, request_id)
            jobs = jobs_of(plan, request_id, model=shim.client.model, tenant=batch.asked.tenant, origin=batch.id,
                           created_ms=batch.created_ms, deadline_ms=batch.expires_ms)
            outcomes = await asyncio.gather(*map(self._jobs.answer, jobs), return_exceptions=True)
            records = [_raised(outcome) for outcome in outcomes]
        except Stopped:
            return self._unanswered(request, self.stopped_as)
        except (InvalidField, ModelNotFound, PayloadTooLarge) as error:
            return self._refused(request, request_id, error)
        return self._judge(request, request_id, plan, records)

    def _judge(self, request: Request, request_id: str, plan: Plan, records: list[FinalRecord]) -> Answer:
        for record in records:
            if record.reason == "expired" or (record.reason == "cancelled" and self.stopped_as):
                return self._unanswered(request, "expired" if record.reason == "expired" else self.stopped_as)
            if record.reason not in ("stop", "length"):
                return self._refused(request, request_id, JobFailed(record.job_id, record.reason, record.error))
        results = [as_result(record) for record in records]
        body = plan.render(results)
        return Answer(line=batch_lines.answered(self._batch.id, request, request_id, 200, body), is_ok=True,
                      input_tokens=sum(result.prompt_tokens for result in results[::len(results) // plan.num_prompts]),
                      output_tokens=sum(len(result.token_ids) for result in results))

    def _refused(self, request: Request, request_id: str, error: TokenmillError) -> Answer:
        status, body = refusal(self._batch.asked.endpoint, error)
        return Answer(line=batch_lines.answered(self._batch.id, request, request_id, status, body), is_ok=False)

    def _unanswered(self, request: Request, why: str) -> Answer:
        return Answer(line=batch_lines.unanswered(self._batch.id, request, *WHY_UNANSWERED[why]), is_ok=False)

    @property
    def _max_line_bytes(self) -> int:
        return self._desk.shim.settings.max_body_bytes


def _raised(outcome: FinalRecord | BaseException) -> FinalRecord:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
