"""Send a job's tokens as server-sent events, and stop the job when its reader has gone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.errors import JobFailed, ReadElsewhere, Unavailable
from coordinator.messages import Finish, TokenRun
from producers.http_errors import error_response
from producers.job_handle import JobHandle

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Events(Protocol):
    """One API's way to write tokens."""

    def encode(self, run: TokenRun) -> bytes: ...
    def end(self, finish: Finish, num_tokens: int) -> bytes: ...


class EventStream(Response):
    """Sends its headers with the first token: a job that fails before has a true error status."""

    def __init__(self, handle: JobHandle, events: Events, spawn: Spawn, *, resume_grace_s: float = 0.0) -> None:
        self._handle, self._events, self._spawn, self._resume_grace_s = handle, events, spawn, resume_grace_s
        self._num_sent = 0
        self._has_ended = False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle = self._handle
        async with open_while_connected(receive, [handle], self._spawn, resume_grace_s=self._resume_grace_s):
            async for runs in handle.runs():
                # All that has come since the last write goes out as one; a slow client makes this wait, and us read later.
                await self._send(send, b"".join(map(self._encode, runs)))
            if handle.finish is None:
                if handle.is_superseded and not self._num_sent:
                    await error_response(ReadElsewhere(handle.job_id))(scope, receive, send)
                return  # the client has gone, or somebody else reads on
            if not self._num_sent and handle.finish.reason not in ("stop", "length"):
                failed = JobFailed(handle.job_id, handle.finish.reason, handle.finish.error)
                await error_response(failed)(scope, receive, send)
                return
            rest = b"" if self._has_ended else self._events.end(handle.finish, handle.tokens.next_index)
            await self._send(send, rest, is_last=True)

    def _encode(self, run: TokenRun) -> bytes:
        self._has_ended = run.finish is not None and bool(run.token_ids)
        return self._events.encode(run)

    async def _send(self, send: Send, body: bytes, *, is_last: bool = False) -> None:
        if not self._num_sent and (body or is_last):
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                       (b"x-job-id", self._handle.job_id.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if body or is_last:
            self._num_sent += 1
            await send({"type": "http.response.body", "body": body, "more_body": not is_last})


@contextlib.asynccontextmanager
async def open_while_connected(receive: Receive, handles: list[JobHandle], spawn: Spawn, *,
                               resume_grace_s: float = 0.0) -> AsyncIterator[None]:
    """Closes the handles when the client disconnects; on the way out, jobs that are not over are cancelled.

    With a grace a job goes on for so long without a reader: its client may come back for it, here or at another shim.
    """
    watch = asyncio.create_task(_wait_for_disconnect(receive, handles))
    try:
        yield
    finally:
        watch.cancel()
        for handle in handles:
            handle.close()
            if handle.finish is None and not handle.is_superseded:
                spawn(_cancel(handle, resume_grace_s))


async def _wait_for_disconnect(receive: Receive, handles: list[JobHandle]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    for handle in handles:
        handle.close()


async def _cancel(handle: JobHandle, resume_grace_s: float) -> None:
    with contextlib.suppress(Unavailable):  # nobody can be reached: the job runs to its end unseen
        if resume_grace_s:
            before = await handle.last_reader()
            await asyncio.sleep(resume_grace_s)
            if handle.is_superseded or await handle.last_reader() != before:
                return
        await handle.cancel()
