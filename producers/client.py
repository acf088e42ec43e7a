"""Submit jobs to a farm and read their tokens: what the REST shim is built on, and what Python programs use directly.

One subscription per client carries the answers of all its jobs. A token is shown once, in order, whatever happens on the way: what a
lost connection or a slow reader missed is read again from the streams.
"""

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from coordinator import subjects
from coordinator.bus import Bus, Message
from coordinator.errors import InvalidField, JobFailed, MalformedMessage, Unavailable
from coordinator.messages import (
    FinalRecord,
    Finish,
    FinishReason,
    Job,
    JobClass,
    TokenRun,
    check_id,
    decode_map,
    new_job_id,
)
from coordinator.sampling import SamplingParams
from coordinator.store import Store
from producers.catch_up import FIRST_SILENCE_S, CatchUp, as_run
from producers.job_stream import JobStream

log = logging.getLogger(__name__)

SUBMIT_TIMEOUT_S = 5.0
MAX_BUSY_S = 0.005


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `finish` is set on the last one, unless the job ended after it without another token (cancelled, say)."""

    index: int
    id: int
    logprob: float
    text: str
    finish: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """A finished job's whole answer. Look at `reason`: only `stop` and `length` are complete answers."""

    job_id: str
    reason: FinishReason
    error: str
    prompt_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    texts: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.texts)


class JobHandle:
    """One open job: one reader takes its tokens by `stream`, `runs` or `result`."""

    def __init__(self, client: "TokenmillClient", job: Job, seen_seq: int) -> None:
        self.job = job
        self.tokens = JobStream()
        self.seen_seq = seen_seq
        self.next_look_s = time.monotonic() + FIRST_SILENCE_S
        self.silence_s = FIRST_SILENCE_S
        self.num_rereads = 0
        self._client = client
        self._news = asyncio.Event()
        self._is_closed = False

    @property
    def job_id(self) -> str:
        return self.job.job_id

    @property
    def finish(self) -> Finish | None:
        """How the job ended, once its last token has arrived."""
        return self.tokens.finish

    def push(self, run: TokenRun, seq: int) -> None:
        """A run has arrived with the frame at `seq` of the stream; called by the client."""
        before = self.tokens.next_index
        self.tokens.push(run)
        if not self.tokens.is_behind:
            self.seen_seq = max(seq, self.seen_seq)
        if self.tokens.next_index != before or self.tokens.finish is not None:
            self.next_look_s = time.monotonic() + FIRST_SILENCE_S
            self.silence_s = FIRST_SILENCE_S
            self.num_rereads = 0
            self._news.set()

    async def runs(self) -> AsyncIterator[list[TokenRun]]:
        """All that has arrived since the last round, as lists of runs; ends with the job or with `close`. For many tokens per second."""
        while True:
            if (arrived := self.tokens.take()):
                yield arrived
                continue
            if self._is_closed or self.tokens.finish is not None:
                return
            if self.tokens.is_behind:
                self._client.catch_up.want(self.job_id)
            self._news.clear()
            await self._news.wait()

    async def stream(self) -> AsyncIterator[Token]:
        """Token by token. Raises JobFailed after the last token when the job ended otherwise than by `stop` or `length`."""
        async for runs in self.runs():
            for run in runs:
                last = len(run.token_ids) - 1
                for i, token_id in enumerate(run.token_ids):
                    reason = run.finish.reason if run.finish is not None and i == last else None
                    yield Token(run.first_index + i, token_id, run.logprobs[i], run.texts[i], reason)
        finish = self._ended()
        if finish.reason not in ("stop", "length"):
            raise JobFailed(self.job_id, finish.reason, finish.error)

    async def result(self) -> JobResult:
        """Wait for the end. Tokens that were read before by `stream` or `runs` are fetched from the final record."""
        read: list[TokenRun] = []
        async for runs in self.runs():
            read += runs
        finish = self._ended()
        if self.tokens.next_index != sum(len(run.token_ids) for run in read):
            read = [as_run(await self._client.final_record(self.job_id))]
        return JobResult(
            job_id=self.job_id, reason=finish.reason, error=finish.error,
            prompt_tokens=finish.prompt_tokens, cached_tokens=finish.cached_tokens,
            token_ids=tuple(t for run in read for t in run.token_ids), logprobs=tuple(p for run in read for p in run.logprobs),
            texts=tuple(x for run in read for x in run.texts))

    async def cancel(self) -> None:
        """Ask the farm to stop; the job ends as `cancelled` unless it is over already."""
        await self._client.cancel(self.job_id)

    def close(self) -> None:
        """Read no more. The job itself goes on; see `cancel`."""
        self._is_closed = True
        self._news.set()
        self._client.forget(self.job_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaving the block before the end cancels the job."""
        self.close()
        if self.finish is None:
            with contextlib.suppress(Unavailable):
                await self.cancel()

    def _ended(self) -> Finish:
        if self.tokens.finish is None:
            raise JobFailed(self.job_id, "cancelled", "this handle was closed before the job ended")
        return self.tokens.finish


class TokenmillClient:
    """A producer. Make it with `connect`; it is an async context manager."""

    def __init__(self, bus: Bus, store: Store | None, *, model: str, origin: str, submit_timeout_s: float = SUBMIT_TIMEOUT_S) -> None:
        self.bus = bus
        self.submit_timeout_s = submit_timeout_s
        self.store = store
        self.model = subjects.model_token(model)
        self.origin = check_id("origin", origin)
        self._yielded_s = 0.0
        self._open: dict[str, JobHandle] = {}
        self.catch_up = CatchUp(bus, self.origin, self._open, self._deliver)

    @classmethod
    async def connect(cls, nats_url: str, redis_url: str | None = None, *, model: str = "default_model_name", origin: str = "",
                      max_queued: int | None = None, connect_timeout_s: float = 10.0, submit_timeout_s: float = SUBMIT_TIMEOUT_S,
                      on_fatal: Callable[[Exception], None] | None = None) -> Self:
        """Connect, make sure that the streams exist, and listen. Without Redis, cancelling reaches only jobs that are running.

        `max_queued` bounds the jobs of a class for the whole farm (None: leave the bound that is there). `submit_timeout_s` is how
        long a submit rides out a broker that is away. `on_fatal` is told if NATS closes the connection for good. Raises Unavailable.
        """
        origin = origin or f"producer-{uuid.uuid4().hex[:12]}"
        bus = await Bus.connect(nats_url, name=origin, on_fatal=on_fatal, timeout_s=connect_timeout_s)
        client = cls(bus, Store(redis_url) if redis_url else None, model=model, origin=origin, submit_timeout_s=submit_timeout_s)
        try:
            await client.start(max_queued=max_queued)
        except BaseException:
            await client.close()
            raise
        return client

    async def start(self, *, max_queued: int | None = None) -> None:
        """Raises Unavailable."""
        is_new_farm = await self.bus.provision(self.model, max_queued=max_queued)
        if is_new_farm and self.store is not None:
            await self.store.found()
        self._live = await self.bus.subscribe(subjects.live(self.origin), self._on_frame, on_gap=self.catch_up.gap)
        self.catch_up.start()

    async def close(self) -> None:
        await self.catch_up.close()
        for handle in list(self._open.values()):
            handle.close()
        await self.bus.close()
        if self.store is not None:
            await self.store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def num_open(self) -> int:
        """Jobs whose answer is being read."""
        return len(self._open)

    async def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, klass: JobClass = "normal",
                     timeout_s: float | None = None, job_id: str | None = None, tenant: str = "", traceparent: str = "") -> JobHandle:
        """Queue one job. When this returns the job is stored and will end, whatever dies.

        `prompt` is text (a worker tokenizes it) or token ids; `params.n` must be 1: several answers are several jobs.
        Submitting the same `job_id` again does not make a second job: the handle shows the first one's answer.
        Raises InvalidField, QueueFull, PayloadTooLarge, Unavailable.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidField("n", "submit one job per answer")
        if params.seed is None:
            params = replace(params, seed=random.getrandbits(64))
        if not prompt:
            raise InvalidField("prompt", "must not be empty")
        now_ms = int(time.time() * 1000)
        job = Job(
            job_id=check_id("job_id", job_id) if job_id is not None else new_job_id(), origin=self.origin, model=self.model, klass=klass,
            text=prompt if isinstance(prompt, str) else None, prompt_ids=None if isinstance(prompt, str) else tuple(prompt), params=params,
            created_ms=now_ms, deadline_ms=None if timeout_s is None else now_ms + int(timeout_s * 1000), tenant=tenant,
            traceparent=traceparent)
        if job.job_id in self._open:
            raise InvalidField("job_id", f"{job.job_id} is open in this client already")
        # Frames of a new job come after all that were seen until now; a job submitted again may have some anywhere.
        handle = self._open[job.job_id] = JobHandle(self, job, self.catch_up.last_seq if job_id is None else 0)
        try:
            await self.bus.publish_job(job, deadline_s=self.submit_timeout_s)
        except Unavailable:
            self.forget(job.job_id)
            with contextlib.suppress(Unavailable):  # it may have been stored all the same: then nobody waits for it
                await self.cancel(job.job_id)
            raise
        except BaseException:
            self.forget(job.job_id)
            raise
        if job_id is not None:
            self.catch_up.want(handle.job_id)
        return handle

    async def cancel(self, job_id: str) -> None:
        """Reaches the job wherever it is: running (at once), or still in the queue (when it is pulled). Idempotent.

        Raises Unavailable if neither way works.
        """
        check_id("job_id", job_id)
        ways = [self.bus.publish(subjects.cancel(job_id), b"")]
        outcomes = await asyncio.gather(*ways, *([self.store.cancel(job_id)] if self.store else []), return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failed) == len(outcomes):
            raise failed[0]

    async def final_record(self, job_id: str, timeout_s: float = 10.0) -> FinalRecord:
        """The job's one record. It is stored just after the last token, so this waits a little. Raises Unavailable if there is none."""
        give_up_at = time.monotonic() + timeout_s
        while (record := await self.bus.get_result(check_id("job_id", job_id))) is None:
            if time.monotonic() > give_up_at:
                raise Unavailable(f"job {job_id} has no final record")
            await asyncio.sleep(0.01)
        return record

    def forget(self, job_id: str) -> None:
        self._open.pop(job_id, None)

    def _on_frame(self, message: Message) -> Awaitable[None] | None:
        seq = int(message.headers.get("Nats-Sequence", 0))
        self.catch_up.last_seq = max(seq, self.catch_up.last_seq)
        try:
            for wire in decode_map(message.data).get("runs", ()):
                if wire[0] in self._open:  # runs of jobs that are not open here are not even decoded
                    self._deliver(wire[0], TokenRun.from_wire(wire), seq)
        except (MalformedMessage, TypeError, LookupError) as error:
            log.error("a frame on %s cannot be read: %s", message.subject, error)
        # A backlog of frames is handled without a pause: let the readers of what came so far run in between.
        now = time.monotonic()
        if now - self._yielded_s < MAX_BUSY_S:
            return None
        self._yielded_s = now
        return asyncio.sleep(0)

    def _deliver(self, job_id: str, run: TokenRun, seq: int) -> None:
        handle = self._open.get(job_id)
        if handle is None:
            return
        handle.push(run, seq)
        if handle.finish is not None:
            self.forget(job_id)
        elif handle.tokens.is_behind and handle.tokens.has_room:
            self.catch_up.want(job_id)
