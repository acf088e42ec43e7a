"""OpenAI's answers, as server-sent events: chunks of one or more choices while their jobs run, then usage and `[DONE]`."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.errors import JobFailed, ReadElsewhere
from coordinator.messages import Finish, TokenRun
from coordinator.tasks import end
from producers.event_stream import Spawn, open_while_connected
from producers.job_handle import JobHandle
from producers.openai_answers import GOOD, Show, empty_logprobs, finish_reason, usage
from producers.openai_errors import openai_error, openai_error_response
from producers.openai_plan import IDS, Shape

DONE = b"data: [DONE]\n\n"
OBJECTS = {"chat": "chat.completion.chunk", "text": "text_completion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """`next_index` (of the one job) is set for a client that can come back: events carry ids, and it has the tokens before."""

    request_id: str
    wants_usage: bool
    next_index: int | None = None


class ChoiceEvents:
    """The chunks of one choice. Every token is read, so that a stream that goes on elsewhere says the same; those before are not sent."""

    def __init__(self, show: Show, shape: Shape, index: int, job_id: str, options: StreamOptions) -> None:
        self._show, self._shape, self._index, self._options = show, shape, index, options
        self._reader = show.reader(shape, job_id) if shape.kind == "chat" else None
        self._echo = shape.echo[index // shape.n] if shape.echo else ""
        self._has_begun = bool(options.next_index)
        self._offset = 0
        self._head = {"id": IDS[shape.kind] + options.request_id, "object": OBJECTS[shape.kind], "created": shape.created,
                      "model": shape.model}
        self.num_tokens = 0
        self.finish: Finish | None = None

    @property
    def num_thought_tokens(self) -> int:
        return self._reader.num_thought_tokens if self._reader is not None else 0

    def encode(self, run: TokenRun) -> bytes:
        """The events of a run, the end of a good answer included."""
        last = len(run.token_ids) - 1
        events = bytearray()
        self.finish = run.finish
        is_good = run.finish is not None and run.finish.reason in GOOD
        for i in range(last + 1):
            events += self._token(run, i, run.finish.reason if run.finish is not None and is_good and i == last else None)
        if last < 0 and run.finish is not None and is_good:
            events += self._end(run.finish.reason, self.num_tokens)
        return bytes(events)

    def tail(self, events: Sequence["ChoiceEvents"]) -> bytes:
        """What comes after the last choice's end."""
        if not self._options.wants_usage:
            return DONE
        ends = [each.finish for each in events[:: self._shape.n] if each.finish is not None]
        counted = usage(sum(end.prompt_tokens for end in ends), sum(each.num_tokens for each in events),
                        sum(end.cached_tokens for end in ends), sum(each.num_thought_tokens for each in events))
        return b"data: %b\n\n" % orjson.dumps({**self._head, "choices": [], "usage": counted}) + DONE

    def _token(self, run: TokenRun, i: int, reason: str | None) -> bytes:
        text, position = run.texts[i], run.first_index + i
        self.num_tokens = position + 1
        delta = self._reader.feed(text, is_last=reason is not None) if self._reader is not None else {"text": text}
        offset, self._offset = self._offset, self._offset + len(text)
        if position < (self._options.next_index or 0):
            return self._event(position, {} if self._reader is not None else {"text": ""}, None, reason) if reason is not None else b""
        logprobs = self._logprobs(run, i, offset) if self._shape.wants_logprobs else None
        return self._event(position, delta, logprobs, reason)

    def _end(self, reason: str, num_tokens: int) -> bytes:
        """For an answer that ends without another token."""
        delta = self._reader.feed("", is_last=True) if self._reader is not None else {"text": ""}
        return self._event(max(0, num_tokens - 1), delta, None, reason)

    def _event(self, position: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        if not self._has_begun:
            self._has_begun = True
            delta = {"text": self._echo + delta["text"]} if self._reader is None else {"role": "assistant", "content": "", **delta}
        elif self._reader is not None and not delta and logprobs is None and reason is None:
            return b""
        has_called = self._reader is not None and self._reader.has_called
        end = None if reason is None else finish_reason(self._shape, reason, has_called=has_called)
        said = delta if self._reader is None else {"delta": delta}
        chunk = {**self._head, "choices": [{"index": self._index, **said, "logprobs": logprobs, "finish_reason": end}]}
        if self._options.wants_usage:
            chunk["usage"] = None
        line = b"data: %b\n\n" % orjson.dumps(chunk)
        return line if self._options.next_index is None else b"id: %d\n%b" % (position, line)

    def _logprobs(self, run: TokenRun, i: int, offset: int) -> dict[str, Any]:
        top = run.top_logprobs[i] if run.top_logprobs else ()
        if self._reader is not None:
            return {"content": [self._show.chat_logprob(run.token_ids[i], run.logprobs[i], top)], "refusal": None}
        logprobs = empty_logprobs()
        self._show.add_text_logprob(logprobs, run.token_ids[i], run.logprobs[i], top, offset)
        return logprobs


class OpenAIStream(Response):
    """Sends its headers with the first token: a request that fails before has a true error status."""

    def __init__(self, handles: list[JobHandle], events: list[ChoiceEvents], spawn: Spawn, *, resume_grace_s: float = 0.0) -> None:
        self._handles, self._events, self._spawn, self._resume_grace_s = handles, events, spawn, resume_grace_s
        self._has_begun = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with open_while_connected(receive, self._handles, self._spawn, resume_grace_s=self._resume_grace_s):
            async for index, runs in _merged(self._handles):
                handle = self._handles[index]
                if runs is not None:
                    # All that has come since the last write goes out as one; a slow client makes this wait, and us read later.
                    await self._send(send, b"".join(map(self._events[index].encode, runs)))
                elif handle.finish is None:
                    await self._give_up(handle, scope, receive, send)
                    return
                elif handle.finish.reason not in GOOD:
                    await self._fail(JobFailed(handle.job_id, handle.finish.reason, handle.finish.error), scope, receive, send)
                    return
                elif self._events[index].finish is None:   # it ended without a run of its own
                    end = TokenRun(job_id=handle.job_id, epoch=0, first_index=handle.tokens.next_index, token_ids=(), logprobs=(), texts=(),
                                   finish=handle.finish)
                    await self._send(send, self._events[index].encode(end))
            await self._send(send, self._events[0].tail(self._events), is_last=True)

    async def _give_up(self, handle: JobHandle, scope: Scope, receive: Receive, send: Send) -> None:
        """The client has gone, or somebody else reads on."""
        if handle.is_superseded and not self._has_begun:
            await openai_error_response(ReadElsewhere(handle.job_id))(scope, receive, send)

    async def _fail(self, error: JobFailed, scope: Scope, receive: Receive, send: Send) -> None:
        if self._has_begun:
            await self._send(send, b"data: %b\n\n" % orjson.dumps(openai_error(error)) + DONE, is_last=True)
        else:
            await openai_error_response(error)(scope, receive, send)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        if not self._has_begun and (body or is_last):
            self._has_begun = True
            job_ids = ", ".join(handle.job_id for handle in self._handles)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                       (b"x-job-id", job_ids.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if body or is_last:
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})


Arrival = tuple[int, list[TokenRun] | None]     # of which handle; None: it is over


async def _merged(handles: Sequence[JobHandle]) -> AsyncIterator[Arrival]:
    """What arrives at any of the handles."""
    if len(handles) == 1:
        async for runs in handles[0].runs():
            yield 0, runs
        yield 0, None
        return
    arrived: asyncio.Queue[Arrival] = asyncio.Queue(maxsize=len(handles))

    async def pump(index: int, handle: JobHandle) -> None:
        async for runs in handle.runs():
            await arrived.put((index, runs))
        await arrived.put((index, None))

    pumps = [asyncio.create_task(pump(index, handle)) for index, handle in enumerate(handles)]
    try:
        num_open = len(handles)
        while num_open:
            arrival = await arrived.get()
            num_open -= arrival[1] is None
            yield arrival
    finally:
        await end(pumps)
