"""Lines of text, or of requests, into the file of a batch."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import orjson

from coordinator.errors import InvalidField
from producers.batch_lines import MAX_LINES


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a line of text becomes a request. `params` are the endpoint's own, beside the prompt."""

    endpoint: str
    model: str
    params: dict[str, Any] = field(default_factory=dict)

    def request(self, number: int, text: str) -> dict[str, Any]:
        return {"custom_id": f"line-{number}", "method": "POST", "url": self.endpoint, "body": self._body(text)}

    def _body(self, text: str) -> dict[str, Any]:
        match self.endpoint:
            case "/generate":
                return {"inputs": text, "parameters": self.params}
            case "/v1/completions":
                return {"model": self.model, "prompt": text, **self.params}
            case _:
                return {"model": self.model, "messages": [{"role": "user", "content": text}], **self.params}


def write_requests(lines: Iterable[bytes], template: Template, out: BinaryIO) -> tuple[int, str]:
    """(number of requests, a hash of them). A line that is a JSON object is a request already; empty lines are left out.

    Raises InvalidField.
    """
    digest = hashlib.sha256()
    num_requests = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        request = line.strip() if line.lstrip()[:1] == b"{" else orjson.dumps(template.request(number, _text(number, line)))
        num_requests += 1
        if num_requests > MAX_LINES:
            raise InvalidField("input", f"a batch has at most {MAX_LINES} requests: split it")
        digest.update(request + b"\n")
        out.write(request + b"\n")
    return num_requests, digest.hexdigest()


def _text(number: int, line: bytes) -> str:
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidField("input", f"line {number} is not UTF-8 ({error})") from None
