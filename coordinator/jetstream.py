"""JetStream on a Connection: its JSON API, stored publishes, and reads of streams by batched direct gets."""

import asyncio
import base64
import json
import time
from dataclasses import dataclass
from typing import Any

from coordinator.connection import ATTEMPT_S, ApiError, Connection, NatsMessage
from coordinator.errors import Unavailable

READ_BATCH = 512              # messages per batched direct get
WRONG_LAST_SEQUENCE, STREAM_NOT_FOUND, MESSAGE_NOT_FOUND = 10071, 10059, 10037


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as it stands in a stream."""

    subject: str
    seq: int
    data: bytes


class JetStream(Connection):
    """A Connection whose server keeps streams."""

    async def api(self, subject: str, body: dict[str, Any] | None = None, timeout_s: float = ATTEMPT_S) -> dict[str, Any]:
        """One call of JetStream's JSON API, without the prefix `$JS.API.`. Raises ApiError, Unavailable."""
        answer = await self.ask(f"$JS.API.{subject}", json.dumps(body).encode() if body is not None else b"", timeout_s=timeout_s)
        return _checked(answer.data)

    async def store(self, subject: str, data: bytes, headers: dict[str, str], timeout_s: float = ATTEMPT_S) -> int:
        """Publish to a stream and wait until it is stored: its sequence. Raises ApiError, PayloadTooLarge, Unavailable."""
        answer = await self.ask(subject, data, headers=headers, timeout_s=timeout_s)
        return int(_checked(answer.data)["seq"])

    async def last_message(self, stream: str, subject: str, timeout_s: float = ATTEMPT_S) -> StoredMessage | None:
        """The newest message of a subject, from the stream's leader (never stale)."""
        return await self._get(stream, {"last_by_subj": subject}, timeout_s)

    async def message_at(self, stream: str, seq: int, timeout_s: float = ATTEMPT_S) -> StoredMessage | None:
        return await self._get(stream, {"seq": seq}, timeout_s)

    async def read_stream(self, stream: str, subject_filter: str, *, start_seq: int = 0, start_time_ms: int | None = None,
                          limit: int | None = None, deadline_s: float = 10.0) -> list[StoredMessage]:
        """All stored messages that match, oldest first, by batched direct gets. Raises Unavailable."""
        messages: list[StoredMessage] = []
        num_left = 1
        give_up_at = time.monotonic() + deadline_s
        while num_left and (limit is None or len(messages) < limit):
            batch = READ_BATCH if limit is None else min(READ_BATCH, limit - len(messages))
            start: dict[str, Any] = {"seq": messages[-1].seq + 1 if messages else max(1, start_seq)}
            if start_time_ms is not None and not messages:
                start = {"start_time": _rfc3339(start_time_ms)}
            query = {**start, "next_by_subj": subject_filter, "batch": batch}
            num_left = await self.retry(
                lambda attempt_s, query=query: self._read_batch(stream, query, messages, attempt_s),  # type: ignore[misc]
                give_up_at - time.monotonic(), f"read of {subject_filter}")
        return messages

    async def _read_batch(self, stream: str, query: dict[str, Any], messages: list[StoredMessage], timeout_s: float) -> int:
        """Append one batch to `messages`; how many are left after it."""
        if messages:   # a retry goes on behind what an interrupted try had read
            query = {"seq": messages[-1].seq + 1, **{k: v for k, v in query.items() if k not in ("seq", "start_time")}}
        num_left: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def take(outcome: NatsMessage | Exception) -> None:
            if num_left.done():
                return
            if isinstance(outcome, Exception):
                num_left.set_exception(outcome)
                return
            headers = outcome.headers or {}
            status = headers.get("Status")
            if status is None:
                messages.append(StoredMessage(headers["Nats-Subject"], int(headers["Nats-Sequence"]), outcome.data))
            elif status == "204":
                num_left.set_result(int(headers.get("Nats-Num-Pending", "0")))
            elif status == "404":
                num_left.set_result(0)
            else:
                num_left.set_exception(ApiError(int(status), 0, str(headers.get("Description", "direct get failed"))))

        return await self.exchange(f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), None, timeout_s, num_left, take)

    async def _get(self, stream: str, query: dict[str, Any], timeout_s: float) -> StoredMessage | None:
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", query, timeout_s))["message"]
        except ApiError as error:
            if error.err_code == MESSAGE_NOT_FOUND:
                return None
            raise
        return StoredMessage(found["subject"], int(found["seq"]), base64.b64decode(found.get("data", "")))


def _checked(data: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        raise Unavailable(f"not an answer of JetStream: {data[:80]!r}") from None
    if (error := answer.get("error")) is not None:
        raise ApiError(error.get("code", 0), error.get("err_code", 0), error.get("description", "no reason given"))
    return answer


def _rfc3339(unix_ms: int) -> str:
    seconds, millis = divmod(unix_ms, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{millis:03d}Z"
