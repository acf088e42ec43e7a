"""What a producer holds of one job: its tokens as they come, its result at the end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from coordinator.errors import JobFailed, ReadElsewhere, Unavailable
from coordinator.messages import FinalRecord, Finish, FinishReason, Job, TokenRun, TopLogprobs
from producers.catch_up import FIRST_SILENCE_S, as_run
from producers.job_stream import JobStream

if TYPE_CHECKING:
    from producers.client import TokenmillClient


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
    top_logprobs: tuple[TopLogprobs, ...] = ()   # one per token if the job asked for them

    @property
    def text(self) -> str:
        return "".join(self.texts)


def as_result(record: FinalRecord) -> JobResult:
    run = as_run(record)
    assert run.finish is not None
    return _collect(record.job_id, run.finish, [run])


@dataclass(slots=True)
class Timing:
    """When things happened to a job that was submitted here; time.monotonic."""

    submitted_s: float
    first_token_s: float | None = None


class JobHandle:
    """One open job: one reader takes its tokens by `stream`, `runs` or `result`."""

    def __init__(self, client: "TokenmillClient", job: Job, seen_seq: int) -> None:
        self.job = job
        self.tokens = JobStream()
        self.seen_seq = seen_seq
        self.next_look_s = time.monotonic() + FIRST_SILENCE_S
        self.silence_s = FIRST_SILENCE_S
        self.num_rereads = 0
        self.num_prompt_tokens = 0
        self.next_index = 0          # of the first token that `stream` shows: a reader who comes back has those before
        self.timing: Timing | None = None
        self.is_superseded = False   # somebody else reads this job now: it is not ours to cancel
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
            if self.timing is not None and self.timing.first_token_s is None:
                self.timing.first_token_s = time.monotonic()

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
                    if run.first_index + i < self.next_index:
                        continue
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
        return _collect(self.job_id, finish, read)

    async def cancel(self) -> None:
        """Ask the farm to stop; the job ends as `cancelled` unless it is over already."""
        await self._client.cancel(self.job_id)

    async def last_reader(self) -> str:
        """A name that changes when somebody else begins to read this job. Raises Unavailable."""
        store = self._client.store
        return (await store.job(self.job_id)).get("reader", "") if store is not None else ""

    def close(self) -> None:
        """Read no more. The job itself goes on; see `cancel`."""
        self._is_closed = True
        self._news.set()
        self._client.forget(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaving the block before the end cancels the job."""
        self.close()
        if self.finish is None and not self.is_superseded:
            with contextlib.suppress(Unavailable):
                await self.cancel()

    def _ended(self) -> Finish:
        if self.tokens.finish is None and self.is_superseded:
            raise ReadElsewhere(self.job_id)
        if self.tokens.finish is None:
            raise JobFailed(self.job_id, "cancelled", "this handle was closed before the job ended")
        return self.tokens.finish


def _collect(job_id: str, finish: Finish, runs: list[TokenRun]) -> JobResult:
    return JobResult(
        job_id=job_id, reason=finish.reason, error=finish.error, prompt_tokens=finish.prompt_tokens, cached_tokens=finish.cached_tokens,
        token_ids=tuple(t for run in runs for t in run.token_ids), logprobs=tuple(p for run in runs for p in run.logprobs),
        texts=tuple(x for run in runs for x in run.texts),
        top_logprobs=tuple(top for run in runs for top in run.top_logprobs))
