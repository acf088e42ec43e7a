"""The JSON lines of a batch: what a line asks, the line that answers it, and the parts in which answers are kept. Pure.

A part is the answers to consecutive lines: a header with its counts, then each answer line behind `+` (for the output file) or `-` (for
the error file). Which lines make a part depends on the input alone, so that whoever leads the batch cuts it in the same way.
"""

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/generate")
MAX_LINES = 50_000
MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_CUSTOM_ID_CHARS = 512
PART_LINES = 64
PART_BYTES = 4 * 1024 * 1024     # of input
_LINE_FIELDS = {"custom_id", "method", "url", "body"}


class BadLine(Exception):
    """A line that is not a request at all: it fails its batch."""

    def __init__(self, number: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = {"code": code, "line": number, "message": message, "param": param}


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` counts lines of the file from 1, `index` counts requests from 0: empty lines are none."""

    number: int
    index: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Request:
    index: int
    custom_id: str
    body: dict[str, Any]


@dataclass(slots=True)
class Part:
    """Consecutive lines, and how they were answered."""

    number: int
    lines: list[Line] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return sum(len(line.raw) for line in self.lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one line: goes to the output file if it `is_ok`."""

    line: bytes
    is_ok: bool
    input_tokens: int = 0
    output_tokens: int = 0


async def requests(raw_lines: AsyncIterable[bytes]) -> AsyncIterator[Line]:
    number = index = 0
    async for raw in raw_lines:
        number += 1
        if raw.strip():
            yield Line(number, index, raw)
            index += 1


async def parts(lines: AsyncIterable[Line]) -> AsyncIterator[Part]:
    part, size_bytes = Part(0), 0
    async for line in lines:
        part.lines.append(line)
        size_bytes += len(line.raw)
        if len(part.lines) == PART_LINES or size_bytes >= PART_BYTES:
            yield part
            part, size_bytes = Part(part.number + 1), 0
    if part.lines:
        yield part


def read_request(line: Line, endpoint: str, max_body_bytes: int) -> Request:
    """Raises BadLine."""
    if len(line.raw) > max_body_bytes:
        raise BadLine(line.number, "line_too_long", f"this line is over the limit of {max_body_bytes} bytes (--max_body_bytes)")
    try:
        asked = orjson.loads(line.raw)
    except orjson.JSONDecodeError as error:
        raise BadLine(line.number, "invalid_json_line", f"this line is not valid JSON: {error}") from None
    if not isinstance(asked, dict):
        raise BadLine(line.number, "invalid_json_line", "this line is not a JSON object")
    for name in asked:
        if name not in _LINE_FIELDS:
            raise BadLine(line.number, "invalid_request", f"unknown field {name[:80]!r}", name[:80])
    custom_id = asked.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise BadLine(line.number, "missing_required_parameter",
                      f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters", "custom_id")
    if asked.get("method") != "POST":
        raise BadLine(line.number, "invalid_method", "method must be POST", "method")
    if asked.get("url") != endpoint:
        raise BadLine(line.number, "mismatched_endpoint", f"url must be the batch's endpoint {endpoint}, got {asked.get('url')!r:.60}",
                      "url")
    if not isinstance(asked.get("body"), dict):
        raise BadLine(line.number, "missing_required_parameter", "body must be an object", "body")
    return Request(line.index, custom_id, asked["body"])


def answered(batch_id: str, request: Request, request_id: str, status_code: int, body: dict[str, Any]) -> bytes:
    """An answer, or a refusal, as the endpoint itself would have given it."""
    return _result(batch_id, request, {"status_code": status_code, "request_id": request_id, "body": body}, None)


def unanswered(batch_id: str, request: Request, code: str, message: str) -> bytes:
    """For a request that was not brought to an end."""
    return _result(batch_id, request, None, {"code": code, "message": message})


def _result(batch_id: str, request: Request, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    return orjson.dumps({"id": f"batch_req_{batch_id.removeprefix('batch_')}_{request.index}", "custom_id": request.custom_id,
                         "response": response, "error": error})


def index_of(result: dict[str, Any]) -> int:
    """Which request of the file a result line answers."""
    return int(result["id"].rpartition("_")[2])


def encode_part(answers: Sequence[Answer]) -> bytes:
    header = {"completed": sum(a.is_ok for a in answers), "failed": sum(not a.is_ok for a in answers),
              "input_tokens": sum(a.input_tokens for a in answers), "output_tokens": sum(a.output_tokens for a in answers)}
    return b"\n".join([orjson.dumps(header), *((b"+" if a.is_ok else b"-") + a.line for a in answers), b""])


def part_prefix(batch_id: str) -> str:
    return f"{batch_id}.part-"


def part_name(batch_id: str, number: int) -> str:
    return f"{part_prefix(batch_id)}{number:06d}"


def part_number(name: str) -> int:
    return int(name.rpartition("-")[2])
