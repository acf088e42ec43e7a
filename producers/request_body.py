"""Read a request's body as one JSON object, within a limit that is checked while reading."""

from typing import Any

import orjson
from starlette.requests import Request

from coordinator.errors import InvalidField, PayloadTooLarge


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Raises PayloadTooLarge, InvalidField (field `body`), or starlette's ClientDisconnect."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise PayloadTooLarge(int(declared), max_bytes, "body", "--max_body_bytes")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLarge(size, max_bytes, "body", "--max_body_bytes")
        chunks.append(chunk)
    try:
        body = orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as error:
        raise InvalidField("body", f"not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidField("body", "must be a JSON object")
    return body


def check_known(body: dict[str, Any], known: frozenset[str]) -> None:
    """A field that would be ignored is refused. Raises InvalidField."""
    for name in body:
        if name not in known:
            raise InvalidField(name[:80], "unknown field")
