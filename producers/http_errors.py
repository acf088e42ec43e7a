"""Every error as `{"message": "<field>: <reason>"}` with the status that says whose fault it is."""

import logging
import math
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coordinator.errors import InvalidField, JobFailed, PayloadTooLarge, QueueFull, ReadElsewhere, TokenmillError, Unavailable, UnknownJob
from coordinator.sampling import DEFAULTS

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
REQUEST_TIMEOUT = 408        # the deadline was the client's own
STATUSES: tuple[tuple[type[TokenmillError], int], ...] = (
    (InvalidField, 400), (UnknownJob, 404), (ReadElsewhere, 409), (PayloadTooLarge, 413), (QueueFull, 429), (Unavailable, 503))
JOB_FIELDS = frozenset({*DEFAULTS, "prompt_ids", "text"})  # an error that begins with one of them is the request's own fault


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def install(app: FastAPI) -> None:
    """Handlers for all errors of `app`, those of the framework too."""
    app.add_exception_handler(TokenmillError, _on_tokenmill_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


def error_response(error: TokenmillError) -> Response:
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    return Json({"message": str(error)}, status_code=status_of(error), headers=headers)


def status_of(error: TokenmillError) -> int:
    if isinstance(error, JobFailed):
        if error.reason == "error" and error.error.partition(":")[0] in JOB_FIELDS:
            return 400
        return {"expired": REQUEST_TIMEOUT, "cancelled": CLIENT_CLOSED_REQUEST}.get(error.reason, 500)
    for kind, status in STATUSES:
        if isinstance(error, kind):
            return status
    return 500


async def _on_tokenmill_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TokenmillError)
    response = error_response(error)
    if response.status_code >= 500:
        log.warning("%s %s: %d %s", request.method, request.url.path, response.status_code, error)
    return response


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Json(_in_shape(request, message, error.status_code), status_code=error.status_code, headers=error.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody is there to read it


async def _on_bug(request: Request, error: Exception) -> Response:
    # The server logs the traceback.
    return Json(_in_shape(request, "internal error; the log has the details", 500), status_code=500)


def _in_shape(request: Request, message: str, status: int) -> dict[str, Any]:
    """What no router has answered, in the shape of the surface that was asked."""
    if not request.url.path.startswith("/v1/"):
        return {"message": message}
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": "not_found" if status == 404 else None}}
