"""Read again what a producer missed: after a lost connection, behind a slow reader, or when the last message of all was the lost one.

Live frames are not acknowledged, so any of them may be lost. A gap shows itself by the next run's index; a lost end shows itself by
silence. Both are answered from what the server stored: the job's final record if there is one, else the chains.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.errors import TokenmillError
from coordinator.messages import FinalRecord, Finish, Job, TokenRun, unpack_floats, unpack_ids
from producers.job_stream import JobStream

log = logging.getLogger(__name__)

TICK_S = 0.25
FIRST_SILENCE_S = 1.0      # without news of a job, its final record is looked for: after 1 s, 2 s more, 4 s more, …
LONGEST_SILENCE_S = 30.0
RECENT_MS = 5_000          # the first look at the chains starts this long before a job's last news, the next at their beginning
DEADLINE_GRACE_S = 5.0     # past a job's deadline before it is given up here, should no worker be there to say so
MAX_HASTY_REREADS = 2      # of the chains without any news from them; after that in the rhythm of silence
MAX_LOOKUPS = 32           # final records asked for at once


class Reader(Protocol):
    """What is known here of one open job."""

    job: Job
    tokens: JobStream
    last_news_s: float        # time.monotonic
    next_look_s: float
    silence_s: float
    num_rereads: int          # since its last news


class CatchUp:
    """One background task per client. `deliver` takes runs as the live subscription does: repeats are harmless."""

    def __init__(self, bus: Bus, origin: str, open_jobs: Mapping[str, Reader], deliver: Callable[[str, TokenRun], None]) -> None:
        self._bus = bus
        self._origin = origin
        self._open = open_jobs
        self._deliver = deliver
        self._wanted: set[str] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.num_rereads = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"catch up {self._origin}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def want(self, job_id: str) -> None:
        """This job is known to be behind."""
        self._wanted.add(job_id)
        self._wake.set()

    def want_all(self) -> None:
        """The connection was lost for a while: any job may have missed something."""
        self._wanted.update(self._open)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_S)
            self._wake.clear()
            try:
                await self._look()
            except TokenmillError as error:
                log.warning("catching up: %s", error)
                await asyncio.sleep(TICK_S)

    async def _look(self) -> None:
        """One round. A job that is still behind after it is wanted again by its next run, by its reader, or by its silence."""
        wanted, self._wanted = self._wanted, set()
        try:
            now = time.monotonic()
            silent = {job_id for job_id, reader in self._open.items() if now >= reader.next_look_s}
            unsettled = await self._from_records(silent | {job_id for job_id in wanted if job_id in self._open})
            for job_id in silent & unsettled:
                self._still_silent(self._open[job_id])
            missing = {job_id for job_id in unsettled if self._may_read_chains(self._open[job_id], is_due=job_id in silent)}
            if missing:
                await self._from_chains(missing)
        except TokenmillError:
            self._wanted |= wanted
            raise

    @staticmethod
    def _may_read_chains(reader: Reader, *, is_due: bool) -> bool:
        return reader.tokens.is_behind and reader.tokens.has_room and (is_due or reader.num_rereads < MAX_HASTY_REREADS)

    async def _from_records(self, job_ids: Iterable[str]) -> set[str]:
        """Deliver the jobs that are over; returns the others."""
        slots = asyncio.Semaphore(MAX_LOOKUPS)

        async def look_up(job_id: str) -> str | None:
            async with slots:
                record = await self._bus.get_result(job_id)
            if record is None:
                return job_id
            self._deliver(job_id, as_run(record))
            return None

        return {job_id for job_id in await asyncio.gather(*map(look_up, job_ids)) if job_id in self._open}

    async def _from_chains(self, job_ids: set[str]) -> None:
        readers = [self._open[job_id] for job_id in job_ids]
        self.num_rereads += 1
        is_second_look = any(reader.num_rereads for reader in readers)
        for reader in readers:
            reader.num_rereads += 1
        ago_ms = 1000 * (time.monotonic() - min(reader.last_news_s for reader in readers))
        start_ms = 0 if is_second_look else max(0, int(time.time() * 1000 - ago_ms) - RECENT_MS)
        for _, _, frame in await self._bus.read_chain(subjects.chains(self._origin), start_time_ms=start_ms):
            for run in frame.runs:
                if run.job_id in job_ids:
                    self._deliver(run.job_id, run)

    def _still_silent(self, reader: Reader) -> None:
        reader.silence_s = min(2 * reader.silence_s, LONGEST_SILENCE_S)
        reader.next_look_s = time.monotonic() + reader.silence_s
        deadline_ms = reader.job.deadline_ms
        if deadline_ms is None:
            return
        late_s = time.time() - deadline_ms / 1000
        if late_s > DEADLINE_GRACE_S:
            finish = Finish(reason="expired", error="no worker took the job before its deadline")
            self._deliver(reader.job.job_id, TokenRun(job_id=reader.job.job_id, epoch=0, first_index=reader.tokens.next_index, token_ids=(),
                                                      logprobs=(), texts=(), finish=finish))
        else:
            reader.next_look_s = min(reader.next_look_s, time.monotonic() + max(0.0, -late_s) + DEADLINE_GRACE_S)


def as_run(record: FinalRecord) -> TokenRun:
    """A final record as one run, from the first token to the end."""
    finish = Finish(reason=record.reason, prompt_tokens=record.prompt_tokens, cached_tokens=record.cached_tokens, error=record.error)
    return TokenRun(job_id=record.job_id, epoch=record.epoch, first_index=0, token_ids=tuple(unpack_ids(record.token_ids)),
                    logprobs=tuple(unpack_floats(record.logprobs)), texts=record.texts, finish=finish)
