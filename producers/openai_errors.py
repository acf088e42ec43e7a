"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}` with the status that says whose fault it is."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from coordinator.errors import InvalidField, JobFailed, TokenmillError, UnknownJob
from producers.http_errors import JOB_FIELDS, Json, error_response, status_of

Handler = Callable[[Request], Awaitable[Response]]

OUR_NAMES = {"inputs": "prompt", "stop_sequences": "stop", "max_new_tokens": "max_tokens", "guided_json": "response_format"}
_TYPES = {429: "rate_limit_error", 503: "overloaded_error", 408: "timeout_error", 409: "conflict_error", 499: "cancelled_error"}
_CODES = {404: "not_found", 413: "body_too_large", 429: "rate_limit_exceeded", 503: "service_unavailable",
          408: "timeout", 409: "read_elsewhere", 499: "cancelled"}


class ModelNotFound(TokenmillError):
    """The model that was asked for is not the one served here."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"the model {asked[:80]!r} does not exist here: this door serves {served!r}")


class UnknownAnswer(UnknownJob):
    """No answer of this id is kept for whoever asks."""

    def __init__(self, answer_id: str) -> None:
        TokenmillError.__init__(self, f"no answer {answer_id[:160]!r} is kept: answers asked with store or background are, for a day")


def openai_error(error: TokenmillError) -> dict[str, Any]:
    """The body. Fields of ours are called as the client wrote them."""
    status = openai_status(error)
    param, message = None, str(error)
    if isinstance(error, InvalidField):
        param = OUR_NAMES.get(error.field, error.field)
        message = f"{param}: {error.reason}"
    elif isinstance(error, JobFailed) and (field := error.error.partition(":")[0]) in JOB_FIELDS:
        param = OUR_NAMES.get(field, field)
    code = "model_not_found" if isinstance(error, ModelNotFound) else _CODES.get(status)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_status(error: TokenmillError) -> int:
    return 404 if isinstance(error, ModelNotFound) else status_of(error)


def openai_error_response(error: TokenmillError) -> Response:
    """With the headers (Retry-After) that every surface gives."""
    plain = error_response(error)
    headers = {name: value for name, value in plain.headers.items() if name == "retry-after"}
    return Json(openai_error(error), status_code=openai_status(error), headers=headers)


def with_openai_errors(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except TokenmillError as error:
            return openai_error_response(error)

    return guarded
