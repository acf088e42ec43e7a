"""Queue the jobs of one batch and wait for their final records. Nothing else of an answer is read: tokens on their way are not its concern.

Job ids and the origin are the batch's own, whichever shim works on it. So a shim that carries on finds what was answered, does not queue
again what is queued or running, and hears of its end. A live frame only says when to look: a lost one costs a few seconds.
"""

import asyncio
import contextlib
import logging

from coordinator import subjects
from coordinator.bus import Bus, Message, Subscription
from coordinator.errors import MalformedMessage, QueueFull, Unavailable
from coordinator.messages import FinalRecord, Job, TokenRun, decode_map
from coordinator.store import Admitted, Store
from producers.open_work import OpenWork

log = logging.getLogger(__name__)

SETTLE_S = (0.004, 0.01, 0.03, 0.1, 0.3, 1.0)    # a final record is stored just after the last frame; looked for after these pauses
FIRST_SILENCE_S, LONGEST_SILENCE_S = 4.0, 30.0
AWAY_S = 0.5
MAX_PUBLISHES = 4           # at once; the others wait their turn, in the order of the lines


class Stopped(Exception):
    """The batch takes no more work: this job was not queued."""


class BatchJobs:
    """Made for one batch by the shim that leads it."""

    def __init__(self, bus: Bus, store: Store, open_work: OpenWork, origin: str) -> None:
        self._bus = bus
        self._store = store
        self._open_work = open_work
        self._origin = origin
        self._live: Subscription | None = None
        self._news: dict[str, asyncio.Event] = {}
        self._turns = asyncio.Semaphore(MAX_PUBLISHES)
        self._is_stopping = False

    async def start(self) -> None:
        self._live = await self._bus.subscribe(subjects.live(self._origin), self._on_frame, on_gap=self._wake_all)

    async def close(self) -> None:
        if self._live is not None:
            await self._live.close()

    async def answer(self, job: Job) -> FinalRecord:
        """Queue a job unless that was done before, and wait for its end. Raises Stopped."""
        if (record := await self._look(job.job_id)) is not None:
            return record
        news = self._news[job.job_id] = asyncio.Event()
        try:
            await self._queue(job)
            return await self._wait(job.job_id, news)
        finally:
            del self._news[job.job_id]

    async def stop(self) -> None:
        """Queue nothing more, and cancel what is queued or running: it ends soon."""
        self._is_stopping = True
        for job_id in list(self._news):
            with contextlib.suppress(Unavailable):
                await self._store.cancel(job_id)
                await self._bus.publish(subjects.cancel(job_id), b"")

    async def _queue(self, job: Job) -> None:
        """A full queue makes this wait, and all that come after it."""
        async with self._turns:
            while not self._is_stopping:
                try:
                    return await self._publish(job)
                except QueueFull as error:
                    await asyncio.sleep(error.retry_after_s)
                except Unavailable as error:
                    log.warning("job %s waits: %s", job.job_id, error)
                    await asyncio.sleep(AWAY_S)
        raise Stopped

    async def _publish(self, job: Job) -> None:
        admitted = Admitted(job_id=job.job_id, origin=job.origin, klass=job.klass, tenant=job.tenant,
                            prompt_tokens=len(job.prompt_ids or ()), max_new_tokens=job.params.max_new_tokens)
        if not await self._open_work.count_in(admitted) and "state" in await self._store.job(job.job_id):
            return  # somebody has claimed it already
        try:
            await self._bus.publish_job(job)
        except QueueFull:
            await self._store.discharge(job.job_id)
            raise

    async def _wait(self, job_id: str, news: asyncio.Event) -> FinalRecord:
        silence_s = FIRST_SILENCE_S
        while True:
            pauses_s: tuple[float, ...] = SETTLE_S
            try:
                async with asyncio.timeout(silence_s):
                    await news.wait()
                news.clear()
            except TimeoutError:
                silence_s, pauses_s = min(2 * silence_s, LONGEST_SILENCE_S), (0.0,)
            for pause_s in pauses_s:
                await asyncio.sleep(pause_s)
                if (record := await self._look(job_id)) is not None:
                    return record

    async def _look(self, job_id: str) -> FinalRecord | None:
        while True:
            try:
                return await self._bus.get_result(job_id)
            except Unavailable as error:
                log.warning("job %s: %s", job_id, error)
                await asyncio.sleep(AWAY_S)

    def _on_frame(self, message: Message) -> None:
        try:
            for wire in decode_map(message.data).get("runs", ()):
                news = self._news.get(wire[0])
                if news is not None and TokenRun.from_wire(wire).finish is not None:
                    news.set()
        except (MalformedMessage, TypeError, LookupError) as error:
            log.error("a frame on %s cannot be read: %s", message.subject, error)

    def _wake_all(self) -> None:
        for news in self._news.values():
            news.set()
