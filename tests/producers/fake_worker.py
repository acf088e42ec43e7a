"""Stands in for a worker and its engine in producer tests: takes real jobs from the real queue, answers on real chains.

Token i of a job is a function of its id, so that a test can tell what a client must have been shown.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Self

from coordinator import subjects
from coordinator.bus import Bus, Chain, Delivery, Puller
from coordinator.fold import Shown
from coordinator.messages import CLASSES, FinalRecord, Finish, FinishReason, Frame, Job, TokenRun
from coordinator.tasks import end

MAX_HELD = 1000


def token_id(job_id: str, index: int) -> int:
    return 3 + zlib.crc32(f"{job_id}:{index}".encode()) % 250


def text(job_id: str, index: int) -> str:
    return f"{token_id(job_id, index)}é "


def answer(job_id: str, count: int) -> str:
    return "".join(text(job_id, i) for i in range(count))


def run(job: Job, first: int, count: int, *, epoch: int = 1, finish: FinishReason | None = None, error: str = "") -> TokenRun:
    indices = range(first, first + count)
    end = None if finish is None else Finish(reason=finish, prompt_tokens=len(job.prompt_ids or ()), cached_tokens=0, error=error)
    return TokenRun(job_id=job.job_id, epoch=epoch, first_index=first, token_ids=tuple(token_id(job.job_id, i) for i in indices),
                    logprobs=tuple(-0.25 * (i + 1) for i in indices), texts=tuple(text(job.job_id, i) for i in indices), finish=end)


class FakeWorker:
    """`serve` decides how a job is answered; the default emits one token per frame up to max_new_tokens."""

    def __init__(self, bus: Bus, model: str, *, name: str = "fake", incarnation: int = 1,
                 serve: "Callable[[FakeWorker, Job], Awaitable[None]] | None" = None) -> None:
        self.bus, self.model, self.name, self.incarnation = bus, model, name, incarnation
        self.jobs: list[Job] = []
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self._serve = serve or one_token_per_frame
        self._chains: dict[str, Chain] = {}
        self._shown: dict[str, Shown] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._commits: set[asyncio.Task[FinalRecord]] = set()    # a reader of the last token may close us before its record is stored

    async def __aenter__(self) -> Self:
        self._cancels = await self.bus.subscribe("cancel.*", lambda message: self.cancelled.put_nowait(message.subject.partition(".")[2]))
        self._puller = await Puller.open(self.bus)
        self._pulling = asyncio.create_task(self._pull())
        return self

    async def __aexit__(self, *_: object) -> None:
        await end([self._pulling, *self._tasks])
        await asyncio.gather(*self._commits, return_exceptions=True)
        await self._puller.close()
        await self._cancels.close()

    async def append(self, *runs: TokenRun, origin: str) -> None:
        """Store one frame. A job's last run also makes its final record."""
        chain = self._chains.get(origin)
        if chain is None:
            chain = self._chains[origin] = Chain(self.bus, subjects.chain(origin, self.name, self.incarnation))
        await chain.append(Frame(runs=runs).encode())

    async def emit(self, job: Job, *runs: TokenRun) -> None:
        shown = self._shown.setdefault(job.job_id, Shown())
        await self.append(*runs, origin=job.origin)
        for r in runs:
            shown.add(f"{self.name}.{self.incarnation}", r)
        if shown.finish is not None:
            commit = asyncio.create_task(self.bus.put_result(shown.record(job)))
            self._commits.add(commit)
            await asyncio.shield(commit)

    async def _pull(self) -> None:
        for klass, lane in product(CLASSES, subjects.job_lanes()):
            self._puller.want(subjects.jobs_consumer(self.model, klass, lane), MAX_HELD)
        while True:
            delivery = await self._puller.next()
            task = asyncio.create_task(self._take(delivery))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take(self, delivery: Delivery) -> None:
        job = Job.decode(delivery.data)
        if any(known.job_id == job.job_id for known in self.jobs):
            return  # delivered again after a broker restart
        self.jobs.append(job)
        await self._serve(self, job)
        await self.bus.ack(delivery.ack_subject)


async def one_token_per_frame(worker: FakeWorker, job: Job) -> None:
    last = job.params.max_new_tokens - 1
    for i in range(last + 1):
        await worker.emit(job, run(job, i, 1, finish="length" if i == last else None))


async def all_at_once(worker: FakeWorker, job: Job) -> None:
    await worker.emit(job, run(job, 0, job.params.max_new_tokens, finish="length"))
