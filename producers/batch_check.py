"""Is a file a batch? Reads it once, line by line, and keeps a mark per custom_id."""

import hashlib
from collections.abc import AsyncIterable
from typing import Any

from producers.batch_lines import MAX_LINES, BadLine, Line, read_request

MAX_ERRORS = 100            # lines that are named when a file is no batch


async def check_lines(requests: AsyncIterable[Line], endpoint: str, max_line_bytes: int) -> tuple[int, list[dict[str, Any]]]:
    """(number of requests, what is wrong with the file as OpenAI's error objects). Raises NoBlob."""
    seen: set[bytes] = set()
    errors: list[dict[str, Any]] = []
    total = 0
    async for line in requests:
        total += 1
        try:
            _check(line, seen, endpoint, max_line_bytes)
        except BadLine as bad:
            errors.append(bad.error)
        if len(errors) == MAX_ERRORS or total > MAX_LINES:
            break
    if not total:
        errors.append({"code": "empty_file", "line": None, "message": "the input file has no requests", "param": "input_file_id"})
    return total, errors


def _check(line: Line, seen: set[bytes], endpoint: str, max_line_bytes: int) -> None:
    if line.index >= MAX_LINES:
        raise BadLine(line.number, "too_many_requests", f"a batch has at most {MAX_LINES} requests", "input_file_id")
    request = read_request(line, endpoint, max_line_bytes)
    mark = hashlib.blake2b(request.custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    if mark in seen:
        raise BadLine(line.number, "duplicate_custom_id", f"custom_id {request.custom_id!r:.80} is used twice", "custom_id")
    seen.add(mark)
