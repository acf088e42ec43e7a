"""Files and batches of a farm over REST, for the command line: rides out shims that die, and goes on at another one."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, BinaryIO, Self

import httpx
import orjson

from coordinator.errors import InvalidField, TokenmillError, Unavailable

PAUSE_S = 0.5
TIMEOUT_S = 60.0
BUSY = frozenset({429, 502, 503, 504})


class BatchRefused(TokenmillError):
    """The farm said no."""


class BatchClient:
    """`urls` are shims of one farm; `patience_s` is how long all of them may be away. An async context manager."""

    def __init__(self, urls: list[str], api_key: str = "", patience_s: float = 60.0) -> None:
        self._urls = [url.rstrip("/") for url in urls]
        self._patience_s = patience_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The name of what the farm serves."""
        return str((await self._ask("GET", "/v1/models"))["data"][0]["id"])

    async def upload(self, name: str, file: BinaryIO) -> str:
        """The file's id. It is read as it is sent."""
        said = await self._ask("POST", "/v1/files", data={"purpose": "batch"}, files={"file": (name, file)})
        return str(said["id"])

    async def create(self, file_id: str, endpoint: str, metadata: dict[str, str], key: str = "") -> dict[str, Any]:
        """With a key, asking again gives the same batch."""
        asked = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", "metadata": metadata}
        return await self._ask("POST", "/v1/batches", json=asked, headers={"Idempotency-Key": key} if key else {})

    async def batch(self, batch_id: str) -> dict[str, Any]:
        return await self._ask("GET", f"/v1/batches/{_as_id(batch_id)}")

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        return await self._ask("POST", f"/v1/batches/{_as_id(batch_id)}/cancel")

    async def parts(self, batch_id: str) -> list[int]:
        """Parts that are answered; none when the batch is over and its files stand."""
        said = await self._ask("GET", f"/v1/batches/{_as_id(batch_id)}/parts")
        return [int(number) for number in said["data"]]

    async def part(self, batch_id: str, number: int) -> list[dict[str, Any]] | None:
        """The answers of one part; None when it has gone into the files."""
        reply = await self._reply("GET", f"/v1/batches/{_as_id(batch_id)}/parts/{number}")
        if reply.status_code == 404:
            return None
        return [orjson.loads(row) for row in _checked(reply).content.splitlines()]

    async def delete_file(self, file_id: str) -> None:
        await self._ask("DELETE", f"/v1/files/{_as_id(file_id)}")

    async def lines(self, file_id: str | None) -> AsyncIterator[bytes]:
        """A file's lines, streamed; none for no file. After a lost connection it goes on behind the last whole line."""
        num_done = 0
        give_up_at = time.monotonic() + self._patience_s
        while file_id is not None:
            try:
                async with self._http.stream("GET", f"{self._urls[0]}/v1/files/{_as_id(file_id)}/content") as reply:
                    if reply.status_code != 200:
                        await reply.aread()
                        _checked(reply)
                    number = 0
                    async for line in _whole_lines(reply):
                        number += 1
                        if number > num_done:
                            yield line
                            num_done = number
                return
            except httpx.TransportError as error:
                await self._next_url(error, give_up_at)

    async def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        said: dict[str, Any] = orjson.loads(_checked(await self._reply(method, path, **options)).content)
        return said

    async def _reply(self, method: str, path: str, **options: Any) -> httpx.Response:
        give_up_at = time.monotonic() + self._patience_s
        while True:
            try:
                reply = await self._http.request(method, self._urls[0] + path, **options)
            except httpx.TransportError as error:
                await self._next_url(error, give_up_at)
                continue
            if reply.status_code not in BUSY or time.monotonic() > give_up_at:
                return reply
            await asyncio.sleep(float(reply.headers.get("Retry-After", PAUSE_S)))

    async def _next_url(self, error: httpx.TransportError, give_up_at: float) -> None:
        if time.monotonic() > give_up_at:
            raise Unavailable(f"no REST shim at {', '.join(self._urls)} ({type(error).__name__} {error}); give --url") from None
        self._urls.append(self._urls.pop(0))
        await asyncio.sleep(PAUSE_S)


async def _whole_lines(reply: httpx.Response) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in reply.aiter_bytes():
        *ended, rest = (rest + chunk).split(b"\n")
        for line in ended:
            yield line


def _checked(reply: httpx.Response) -> httpx.Response:
    """Raises BatchRefused with what the farm says."""
    if reply.is_success:
        return reply
    try:
        body = orjson.loads(reply.content)
        message = body["error"]["message"] if "error" in body else body["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = reply.text[:300]
    raise BatchRefused(f"{reply.status_code}: {message}")


def _as_id(value: str) -> str:
    if not value.replace("-", "").replace("_", "").isalnum():
        raise InvalidField("id", f"must be letters, digits, '-' or '_', got {value!r:.80}")
    return value
