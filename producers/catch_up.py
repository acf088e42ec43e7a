"""Read again what a producer missed: after a lost connection, behind a slow reader, or when the last message of all was the lost one.

Live frames are not acknowledged, so any of them may be lost. A gap shows itself by the next run's index, a lost end by silence. Both are
answered from what the server stored: the job's final record if there is one, else the chains. No clock is trusted: frames are found by
their sequence in the stream.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.errors import TokenmillError
from coordinator.messages import FinalRecord, Finish, Job, TokenRun, unpack_floats, unpack_ids, unpack_tops
from coordinator.tasks import end
from producers.job_stream import JobStream

log = logging.getLogger(__name__)

TICK_S = 0.25
FIRST_SILENCE_S = 1.0      # without news of a job, its final record is looked for: after 1 s, 2 s more, 4 s more, …
LONGEST_SILENCE_S = 30.0
DEADLINE_GRACE_S = 5.0     # past a job's deadline before it is given up here, should no worker be there to say so
MAX_HASTY_REREADS = 2      # of the chains for one job without any news from them; after that in the rhythm of silence
MAX_LOOKUPS = 32           # final records asked for at once


class Reader(Protocol):
    """What is known here of one open job."""

    @property
    def job(self) -> Job: ...
    @property
    def tokens(self) -> JobStream: ...

    seen_seq: int             # the missing frames of this job come after this one in the stream
    next_look_s: float        # time.monotonic
    silence_s: float
    num_rereads: int          # of the chains, since its last news


class CatchUp:
    """One background task per client. `deliver(job_id, run, stream sequence)` takes runs as the live subscription does, repeats too."""

    def __init__(self, bus: Bus, origin: str, open_jobs: Mapping[str, Reader], deliver: Callable[[str, TokenRun, int], None]) -> None:
        self._bus = bus
        self._origin = origin
        self._open = open_jobs
        self._deliver = deliver
        self._wanted: set[str] = set()
        self._has_gap = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.last_seq = 0          # of the newest live frame; set by the client
        self._last_seq_before = 0  # the same, one tick ago
        self._safe_seq = 0         # nothing up to here was missed
        self.num_rereads = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"catch up {self._origin}")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    def want(self, job_id: str) -> None:
        """This job is known to be behind."""
        self._wanted.add(job_id)
        self._wake.set()

    def gap(self) -> None:
        """The connection was lost for a while, or we were too slow for it: any job may have missed something."""
        self._has_gap = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                self._advance_safe_seq()
            self._wake.clear()
            try:
                await self._look()
            except TokenmillError as error:
                log.warning("catching up: %s", error)
                await asyncio.sleep(TICK_S)

    def _advance_safe_seq(self) -> None:
        # One tick late: a gap is told a little after the first frame behind it may have come.
        if not self._has_gap and self._bus.is_connected:
            self._safe_seq, self._last_seq_before = self._last_seq_before, self.last_seq

    async def _look(self) -> None:
        """One round. A job that is still behind after it is wanted again by its next run, by its reader, or by its silence."""
        wanted, self._wanted = self._wanted, set()
        had_gap, self._has_gap = self._has_gap, False
        now = time.monotonic()
        silent = [job_id for job_id, reader in self._open.items() if now >= reader.next_look_s]
        looked_at = {job_id for job_id in wanted & self._open.keys() if self._open[job_id].num_rereads < MAX_HASTY_REREADS} | set(silent)
        try:
            await self._from_records(looked_at)
            for job_id in silent:
                if job_id in self._open:
                    self._still_silent(self._open[job_id])
            left = [self._open[job_id] for job_id in looked_at if job_id in self._open]
            behind = [reader for reader in left if reader.tokens.is_behind and reader.tokens.has_room]
            if behind or (had_gap and self._open):
                await self._from_chains(min([reader.seen_seq for reader in behind] + ([self._safe_seq] if had_gap else [])), behind)
        except TokenmillError:
            self._wanted |= wanted
            self._has_gap = self._has_gap or had_gap
            raise

    async def _from_records(self, job_ids: Iterable[str]) -> None:
        """Deliver the answers of the jobs that are over."""
        slots = asyncio.Semaphore(MAX_LOOKUPS)

        async def look_up(job_id: str) -> None:
            async with slots:
                record = await self._bus.get_result(job_id)
            if record is not None:
                self._deliver(job_id, as_run(record), self.last_seq)

        await asyncio.gather(*map(look_up, job_ids))

    async def _from_chains(self, after_seq: int, behind: list[Reader]) -> None:
        self.num_rereads += 1
        for reader in behind:
            reader.num_rereads += 1
        for _, seq, frame in await self._bus.read_chain(subjects.chains(self._origin), start_seq=after_seq + 1):
            for run in frame.runs:
                self._deliver(run.job_id, run, seq)

    def _still_silent(self, reader: Reader) -> None:
        now = time.monotonic()
        reader.silence_s = min(2 * reader.silence_s, LONGEST_SILENCE_S)
        reader.next_look_s = now + reader.silence_s
        if reader.job.deadline_ms is None:
            return
        give_up_in_s = reader.job.deadline_ms / 1000 + DEADLINE_GRACE_S - time.time()
        if give_up_in_s > 0:
            reader.next_look_s = min(reader.next_look_s, now + give_up_in_s)
            return
        finish = Finish(reason="expired", error="no worker ended the job at its deadline")
        self._deliver(reader.job.job_id, TokenRun(job_id=reader.job.job_id, epoch=0, first_index=reader.tokens.next_index, token_ids=(),
                                                  logprobs=(), texts=(), finish=finish), reader.seen_seq)


def as_run(record: FinalRecord) -> TokenRun:
    """A final record as one run, from the first token to the end."""
    finish = Finish(reason=record.reason, prompt_tokens=record.prompt_tokens, cached_tokens=record.cached_tokens, error=record.error)
    return TokenRun(job_id=record.job_id, epoch=record.epoch, first_index=0, token_ids=tuple(unpack_ids(record.token_ids)),
                    logprobs=tuple(unpack_floats(record.logprobs)), texts=record.texts, finish=finish,
                    top_logprobs=unpack_tops(record.top_logprobs))
