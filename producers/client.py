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
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from coordinator import subjects
from coordinator.bus import Bus, Message, Subscription
from coordinator.errors import InvalidField, MalformedMessage, QueueFull, Unavailable, UnknownJob
from coordinator.messages import (
    FinalRecord,
    Job,
    JobClass,
    TokenRun,
    check_id,
    decode_map,
    new_job_id,
)
from coordinator.routing import RoutingPolicy
from coordinator.sampling import SamplingParams
from coordinator.store import AdmissionLimits, Admitted, Store
from producers.catch_up import CatchUp
from producers.job_handle import JobHandle, JobResult, Timing, Token, as_result
from producers.open_work import LimitsOf, OpenWork
from producers.router import Router

__all__ = ["JobHandle", "JobResult", "Token", "TokenmillClient"]

log = logging.getLogger(__name__)

SUBMIT_TIMEOUT_S = 5.0
MAX_BUSY_S = 0.005
LOOK_AGAIN_S = 5.0         # for a final record whose announcement may have been lost
FULL_S = 0.05              # a queue that was full is taken to be full for so long: refusing costs nothing then


class JobObserver(Protocol):
    """Told of every job that is submitted by one client, and of its end as it is read there."""

    def submitted(self) -> None: ...
    def ended(self, handle: JobHandle) -> None: ...


class TokenmillClient:
    """A producer. Make it with `connect`; it is an async context manager."""

    def __init__(self, bus: Bus, store: Store | None, *, model: str, origin: str, submit_timeout_s: float = SUBMIT_TIMEOUT_S,
                 limits: AdmissionLimits | None = None, limits_of: LimitsOf | None = None, routing: RoutingPolicy | None = None) -> None:
        self.bus = bus
        self.submit_timeout_s = submit_timeout_s
        self.store = store
        self.model = subjects.model_token(model)
        self.origin = check_id("origin", origin)
        self.observer: JobObserver | None = None
        self._yielded_s = 0.0
        self._open_work = OpenWork(store, limits or AdmissionLimits(), limits_of) if store is not None else None
        self.router = Router(store, self.model, routing) if store is not None and routing is not None and routing.is_needed else None
        self._live: Subscription | None = None
        self._turn = asyncio.Lock()
        self._full_until: dict[str, float] = {}        # by subject: refused a moment ago
        self._peers: dict[str, TokenmillClient] = {}   # by origin: readers of other producers' jobs
        self._open: dict[str, JobHandle] = {}
        self.catch_up = CatchUp(bus, self.origin, self._open, self._deliver)

    @classmethod
    async def connect(cls, nats_url: str, redis_url: str | None = None, *, model: str = "default_model_name", origin: str = "",
                      max_queued: int | None = None, connect_timeout_s: float = 10.0, submit_timeout_s: float = SUBMIT_TIMEOUT_S,
                      on_fatal: Callable[[Exception], None] | None = None, limits: AdmissionLimits | None = None,
                      limits_of: LimitsOf | None = None, routing: RoutingPolicy | None = None) -> Self:
        """Connect, make sure that the streams exist, and listen.

        Without Redis, cancelling reaches only jobs that are running, only their number bounds the queue (not their tokens), and jobs
        of other producers cannot be followed.

        `max_queued` bounds the jobs of a class for the whole farm (None: leave the bound that is there). `submit_timeout_s` is how
        long a submit rides out a broker that is away. `on_fatal` is told if NATS closes the connection for good. `routing` may send jobs
        to workers that have their prompts cached (docs/routing.md); it needs Redis. Raises Unavailable.
        """
        origin = origin or f"producer-{uuid.uuid4().hex[:12]}"
        bus = await Bus.connect(nats_url, name=origin, on_fatal=on_fatal, timeout_s=connect_timeout_s)
        client = cls(bus, Store(redis_url) if redis_url else None, model=model, origin=origin, submit_timeout_s=submit_timeout_s,
                     limits=limits, limits_of=limits_of, routing=routing)
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
        if self.router is not None:
            await self.router.start()
        await self._listen()

    async def close(self) -> None:
        for peer in self._peers.values():
            await peer._stop_listening()
        await self._stop_listening()
        if self.router is not None:
            await self.router.close()
        if self._open_work is not None:
            await self._open_work.settle()
        await self.bus.close()
        if self.store is not None:
            await self.store.close()

    async def _listen(self) -> None:
        """A second call does nothing."""
        async with self._turn:
            if self._live is None:
                self._live = await self.bus.subscribe(subjects.live(self.origin), self._on_frame, on_gap=self.catch_up.gap)
                self.catch_up.start()

    async def _stop_listening(self) -> None:
        await self.catch_up.close()
        for handle in list(self._open.values()):
            handle.close()
        if self._live is not None:
            await self._live.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def num_open(self) -> int:
        """Jobs whose answer is being read."""
        return len(self._open)

    @property
    def open_work(self) -> OpenWork | None:
        """Where jobs are counted in that are published beside `submit` (batches)."""
        return self._open_work

    async def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, klass: JobClass = "normal",
                     timeout_s: float | None = None, job_id: str | None = None, tenant: str = "", traceparent: str = "") -> JobHandle:
        """Queue one job. When this returns the job is stored and will end, whatever dies.

        `prompt` is text (a worker tokenizes it) or token ids; `params.n` must be 1: several answers are several jobs.
        Submitting the same `job_id` again, here or elsewhere, does not make a second job: the handle follows the first one.
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
            return await self.follow(job.job_id)
        subject = subjects.jobs(job.model, job.klass, subjects.tenant_lane(tenant))
        if job_id is None and time.monotonic() < self._full_until.get(subject, 0.0):
            raise QueueFull(subject)
        if self._open_work is not None and not await self._open_work.count_in(_as_admitted(job, prompt, is_named=job_id is not None)):
            return await self._submit_again(job)
        # Frames of a new job come after all that were seen until now; a job submitted again may have some anywhere.
        handle = self._open[job.job_id] = JobHandle(self, job, self.catch_up.last_seq if job_id is None else 0)
        handle.timing = Timing(time.monotonic())
        try:
            await self._publish(job)
        except Unavailable:
            self.forget(handle)
            if job_id is None:  # it may have been stored all the same, and nobody can ask for it again
                with contextlib.suppress(Unavailable):
                    await self.cancel(job.job_id)
            raise
        except BaseException as error:
            if isinstance(error, QueueFull):
                self._full_until[subject] = time.monotonic() + FULL_S
            self.forget(handle)
            if self._open_work is not None:
                self._open_work.count_out(job.job_id)
            raise
        if self.observer is not None:
            self.observer.submitted()
        if job_id is not None:
            self.catch_up.want(handle.job_id)
        return handle

    async def _publish(self, job: Job) -> None:
        """Into the lane that the router finds, if there is one and it has room; else where all jobs go."""
        lane = await self.router.lane(job.prompt_ids) if self.router is not None and job.prompt_ids is not None else ""
        if lane:
            with contextlib.suppress(QueueFull):
                await self.bus.publish_job(job, lane=lane, deadline_s=self.submit_timeout_s)
                return
        await self.bus.publish_job(job, deadline_s=self.submit_timeout_s)

    async def _submit_again(self, job: Job) -> JobHandle:
        """A job whose id was admitted before, by a producer that may have died before it published."""
        assert self.store is not None
        known = await self.store.job(job.job_id)
        if "state" not in known:  # nobody has claimed it yet. A second copy in the queue would be harmless: it is claimed once
            await self.bus.publish_job(replace(job, origin=known.get("origin", job.origin)), deadline_s=self.submit_timeout_s)
        return await self.follow(job.job_id)

    async def resume(self, job_id: str, next_index: int = 0, *, origin: str = "") -> JobHandle:
        """Read on where a reader stopped, in this process or in one that is gone: its `stream` begins with token `next_index`.

        Without Redis name the `origin` that the job was submitted under. Raises as `follow` does.
        """
        handle = await self.follow(job_id, origin=origin)
        handle.next_index = next_index
        return handle

    async def stream(self, job_id: str, next_index: int = 0) -> AsyncIterator[Token]:
        """The tokens of a job by its id. Leaving the loop does not cancel the job. Raises as `resume` and JobHandle.stream do."""
        handle = await self.resume(job_id, next_index)
        try:
            async for token in handle.stream():
                yield token
        finally:
            handle.close()

    async def result(self, job_id: str, timeout_s: float | None = None) -> JobResult:
        """The whole answer of a job by its id, when it is over. Raises as `await_record` does."""
        return as_result(await self.await_record(job_id, timeout_s))

    async def await_record(self, job_id: str, timeout_s: float | None = None) -> FinalRecord:
        """Wait for the end of a job, whoever submitted it. Who reads its tokens meanwhile is not disturbed.

        Raises UnknownJob (never without Redis: it waits), Unavailable (time is over).
        """
        arrived: asyncio.Future[FinalRecord] = asyncio.get_running_loop().create_future()
        look_again = asyncio.Event()

        def take(message: Message) -> None:
            if not arrived.done():
                arrived.set_result(FinalRecord.decode(message.data))
            look_again.set()

        subject = subjects.result(check_id("job_id", job_id))
        subscription = await self.bus.subscribe(subject, take, on_gap=look_again.set)
        try:
            async with asyncio.timeout(timeout_s):
                while not arrived.done():
                    look_again.clear()
                    if (record := await self.bus.get_result(job_id)) is not None:
                        return record
                    if self.store is not None and job_id not in self._open:
                        await self._look_up(job_id)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_AGAIN_S):
                            await look_again.wait()
                return arrived.result()
        except TimeoutError:
            raise Unavailable(f"job {job_id} is not over within {timeout_s:g} s") from None
        finally:
            await subscription.close()

    async def follow(self, job_id: str, *, origin: str = "") -> JobHandle:
        """Read a job from its first token, whoever submitted it. A handle that is open on it in this client closes: the newest reads.

        `origin`, if known, saves the look-up. Raises UnknownJob, Unavailable.
        """
        check_id("job_id", job_id)
        origin = origin or (self.origin if job_id in self._open else "")
        known = {"origin": check_id("origin", origin)} if origin else await self._look_up(job_id)
        origin = known["origin"]
        if self.store is not None:
            await self.store.note_reader(job_id, uuid.uuid4().hex)
        peer = self if origin == self.origin else self._peers.get(origin)
        if peer is None:
            peer = self._peers[origin] = TokenmillClient(self.bus, self.store, model=self.model, origin=origin)
        if (former := peer._open.get(job_id)) is not None:
            former.is_superseded = True
            former.close()
        handle = peer._open[job_id] = JobHandle(peer, Job(job_id=job_id, origin=origin, model=self.model, text="-"), 0)
        handle.num_prompt_tokens = int(known.get("prompt_tokens", 0))
        await peer._listen()
        peer.catch_up.want(job_id)
        await self._drop_idle_peers()
        return handle

    async def _drop_idle_peers(self) -> None:
        idle = [self._peers.pop(origin) for origin in [origin for origin, peer in self._peers.items() if not peer._open]]
        for peer in idle:
            await peer._stop_listening()

    async def _look_up(self, job_id: str) -> dict[str, str]:
        """At least the `origin` of a job. Raises UnknownJob, Unavailable."""
        known = await self.store.job(job_id) if self.store is not None else {}
        if "origin" in known:
            return known
        record = await self.bus.get_result(job_id)
        if record is None:
            raise UnknownJob(job_id)
        return {"origin": record.origin}

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

    def forget(self, handle: JobHandle) -> None:
        if self._open.get(handle.job_id) is handle:
            del self._open[handle.job_id]

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
            self.forget(handle)
            if self.observer is not None:
                self.observer.ended(handle)
        elif handle.tokens.is_behind and handle.tokens.has_room:
            self.catch_up.want(job_id)


def _as_admitted(job: Job, prompt: str | Sequence[int], *, is_named: bool) -> Admitted:
    # Text that a worker will tokenize counts by a rule of thumb.
    prompt_tokens = 1 + len(prompt) // 4 if isinstance(prompt, str) else len(prompt)
    return Admitted(job_id=job.job_id, origin=job.origin, klass=job.klass, tenant=job.tenant, prompt_tokens=prompt_tokens,
                    max_new_tokens=job.params.max_new_tokens, is_named=is_named)
