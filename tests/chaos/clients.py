"""The three doors, each with a client that does not give up: whatever breaks, it asks again until its job has ended."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from itertools import count

import httpx

from coordinator.errors import JobFailed, Unavailable
from coordinator.messages import new_job_id
from producers.client import TokenmillClient
from tests.chaos.answer import Answer
from tests.chaos.workload import Spec

RETRY_S = 0.1
PATIENCE_S = 60.0     # without a byte, before a REST client tries another door
JOB_ID = "X-Job-Id"


class Clients:
    """Asks for specs through REST shims and a TokenmillClient of its own; an async context manager.

    urls        of the shims; a client whose shim fails goes on with the next one
    patience_s  how long a REST client waits for the next byte before it takes its shim for dead
    """

    def __init__(self, urls: Sequence[str], direct: TokenmillClient, patience_s: float = PATIENCE_S) -> None:
        self._urls = list(urls)
        self._direct = direct
        self._turn = count()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(patience_s, connect=2.0)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits)

    async def __aenter__(self) -> "Clients":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, spec: Spec) -> Answer:
        """Until the job has ended."""
        answer = Answer(spec, new_job_id())
        await {"stream": self._stream, "plain": self._plain, "client": self._client}[spec.kind](answer)
        return answer

    # ---- POST /generate_stream, resumed by Last-Event-ID ----

    async def _stream(self, answer: Answer) -> None:
        is_accepted = False
        while not answer.reason:
            if is_accepted:
                request = self._request("GET", f"/jobs/{answer.job_id}/stream", {"Last-Event-ID": str(len(answer.token_ids) - 1)}
                                        if answer.token_ids else {})
            else:
                request = self._request("POST", "/generate_stream", {JOB_ID: answer.job_id}, _body(answer.spec))
            try:
                response = await self._http.send(request, stream=True)
                try:
                    if response.status_code == 200:
                        is_accepted = True
                        await _read_events(response, answer)
                    elif is_accepted and response.status_code in (404, 503):   # 404: Redis has lost its data, its owner will say
                        await self._back_off(answer)
                    else:
                        await self._refused(answer, response)
                finally:
                    await response.aclose()
            except httpx.HTTPError:
                await self._back_off(answer)

    # ---- POST /generate, asked again with the same id ----

    async def _plain(self, answer: Answer) -> None:
        while not answer.reason:
            request = self._request("POST", "/generate", {JOB_ID: answer.job_id}, _body(answer.spec, return_details=True))
            try:
                response = await self._http.send(request)
            except httpx.HTTPError:
                await self._back_off(answer)
                continue
            if response.status_code != 200:
                await self._refused(answer, response)
                continue
            body = response.json()
            if (given := response.headers[JOB_ID]) != answer.job_id:
                answer.violations.append(f"asked for as {answer.job_id}, answered as {given}")
            for token in body["tokens"]:
                answer.take(token["count_output_tokens"] - 1, token["id"], token["text"])
            answer.end(body["finish_reason"])

    # ---- the client class ----

    async def _client(self, answer: Answer) -> None:
        while True:
            try:
                handle = await self._direct.submit(answer.spec.prompt, answer.spec.params, job_id=answer.job_id)
                break
            except Unavailable:
                await self._back_off(answer)
        try:
            async for token in handle.stream():
                answer.take(token.index, token.id, token.text)
            assert handle.finish is not None
            answer.end(handle.finish.reason)
        except JobFailed as error:
            answer.end(error.reason)

    # ---- what they share ----

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> httpx.Request:
        url = self._urls[next(self._turn) % len(self._urls)]
        return self._http.build_request(method, url + path, headers={"Content-Type": "application/json", **headers}, content=body)

    async def _refused(self, answer: Answer, response: httpx.Response) -> None:
        """An answer with an error status before any token: busy doors are asked again, everything else is the end."""
        await response.aread()
        if response.status_code in (429, 503):
            await self._back_off(answer)
        else:
            answer.violations.append(f"status {response.status_code}: {response.text[:300]}")
            answer.end("refused")

    async def _back_off(self, answer: Answer) -> None:
        answer.num_retries += 1
        await asyncio.sleep(RETRY_S)


def _body(spec: Spec, **more: object) -> bytes:
    return json.dumps({"inputs": spec.prompt, "parameters": {**spec.parameters, **more}}).encode()


async def _read_events(response: httpx.Response, answer: Answer) -> None:
    async for event in _events(response):
        token = event["token"]
        if token["id"] >= 0:
            answer.take(token["count_output_tokens"] - 1, token["id"], token["text"])
        if event["finished"]:
            answer.end(event["finish_reason"])
            return


async def _events(response: httpx.Response) -> AsyncIterator[dict]:  # type: ignore[type-arg]
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield json.loads(line[5:])
