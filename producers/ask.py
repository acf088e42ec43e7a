"""One question, one answer over NATS: a request on `ask.<model>` becomes a durable job, the reply is its final record.

The shims of a model share the subject as a queue group. docs/wire.md has the contract; it is for `nats req` and for programs that want no
stream. A shim that dies loses its replies, not the jobs: ask again with the same X-Job-Id.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

import orjson

from coordinator import subjects
from coordinator.bus import Message, Subscription
from coordinator.errors import InvalidField, JobFailed, MalformedMessage, QueueFull, ReadElsewhere, TokenmillError, Unavailable
from coordinator.messages import FinalRecord, decode_map, encode_map, unpack_ids
from coordinator.sampling import SamplingParams
from producers.admission import Admission, split
from producers.client import TokenmillClient
from producers.http_errors import status_of
from producers.job_options import JobOptions, read_options
from producers.lightllm_shapes import as_ours, record_object
from producers.request_body import check_known

log = logging.getLogger(__name__)

QUEUE = "shims"
DEFAULT_TIMEOUT_S = 60.0     # nobody tells us when the asker has gone: its job ends by itself
GRACE_S = 5.0                # past its deadline, for a job that no worker has ended
MAX_OPEN = 256               # questions answered at once by one shim


class Responder:
    """Answers questions while it is open. `spawn` runs each one beside the subscription."""

    def __init__(self, client: TokenmillClient, admission: Admission, spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._client, self._admission, self._spawn = client, admission, spawn
        self._num_open = 0
        self._subscription: Subscription | None = None

    async def open(self) -> None:
        """Raises Unavailable."""
        self._subscription = await self._client.bus.subscribe(subjects.ask(self._client.model), self._take, queue=QUEUE)

    async def close(self) -> None:
        """Takes no more. What was taken is answered still, as long as the client is open."""
        if self._subscription is not None:
            await self._subscription.close()

    def _take(self, message: Message) -> None:
        if message.reply:   # a publish: nobody would read an answer, and the job could not be found again
            self._spawn(self._answer(message))

    async def _answer(self, message: Message) -> None:
        is_json = message.data[:1] == b"{"
        self._num_open += 1
        try:
            if self._num_open > MAX_OPEN:
                raise QueueFull(f"{subjects.ask(self._client.model)} of this shim")
            record = await self._ask(message, is_json)
            body = orjson.dumps(record_object(record)) if is_json else record.encode()
            await self._client.bus.publish(message.reply, body)
        except TokenmillError as error:
            log.info("%s: %s", message.subject, error)
            with contextlib.suppress(Unavailable):
                await self._refuse(message.reply, error, is_json)
        finally:
            self._num_open -= 1

    async def _ask(self, message: Message, is_json: bool) -> FinalRecord:
        options = read_options({name.lower(): value for name, value in message.headers.items()}, "normal")
        prompt, given = _from_json(message.data) if is_json else _from_msgpack(message.data)
        params = self._admission.params(given)
        if params.n != 1:
            raise InvalidField("n", f"must be 1: one question has one answer, got {params.n}")
        prompt_ids = await self._admission.prompt(prompt, params)
        return await self._run(prompt_ids, split(params, random.getrandbits(64))[0], options)

    async def _run(self, prompt_ids: tuple[int, ...], params: SamplingParams, options: JobOptions) -> FinalRecord:
        timeout_s = options.timeout_s or DEFAULT_TIMEOUT_S
        handle = await self._client.submit(prompt_ids, params, klass=options.klass, timeout_s=timeout_s, job_id=options.job_id,
                                           tenant=options.tenant)
        try:
            async with asyncio.timeout(timeout_s + GRACE_S):
                with contextlib.suppress(ReadElsewhere, JobFailed):   # its record comes all the same
                    await handle.result()
                return await self._client.await_record(handle.job_id)
        except TimeoutError:
            raise JobFailed(handle.job_id, "expired") from None
        finally:
            handle.close()

    async def _refuse(self, reply: str, error: TokenmillError, is_json: bool) -> None:
        """Errors also travel as the headers that NATS services use."""
        status = 400 if isinstance(error, MalformedMessage) else status_of(error)
        headers = {"Nats-Service-Error-Code": str(status), "Nats-Service-Error": str(error).replace("\r", " ").replace("\n", " ")[:500]}
        refusal = {"refused": str(error), "status": status}
        await self._client.bus.publish(reply, orjson.dumps(refusal) if is_json else encode_map(refusal), headers=headers)


def _from_json(data: bytes) -> tuple[Any, dict[str, Any]]:
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidField("body", f"not valid JSON: {error}") from None
    check_known(body, frozenset({"inputs", "parameters"}))
    given = body.get("parameters")
    if given is not None and not isinstance(given, dict):
        raise InvalidField("parameters", "must be an object")
    return body.get("inputs"), as_ours(given or {})


def _from_msgpack(data: bytes) -> tuple[Any, dict[str, Any]]:
    body = decode_map(data)
    check_known(body, frozenset({"text", "prompt_ids", "params"}))
    packed, text = body.get("prompt_ids"), body.get("text")
    if (packed is None) == (text is None):
        raise InvalidField("prompt_ids", "exactly one of prompt_ids and text must be given")
    if packed is not None and not isinstance(packed, bytes):
        raise InvalidField("prompt_ids", "must be packed little-endian u32 bytes")
    return (text if packed is None else unpack_ids(packed)), body.get("params", {})
