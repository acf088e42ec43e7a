"""OpenAI's files and batches: /v1/files, /v1/batches. Beyond OpenAI's: /v1/batches/{id}/parts shows answers while the batch runs."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from coordinator.errors import InvalidField, PayloadTooLarge, TokenmillError
from producers import batch_lines
from producers.batch_endpoints import check_endpoint
from producers.batch_files import UnknownFile, new_file_id
from producers.batch_lines import MAX_FILE_BYTES
from producers.batch_runner import BatchRunner
from producers.batches import COMES_FROM, Asked, Batch
from producers.file_store import CHUNK_BYTES, lines
from producers.http_errors import Json
from producers.job_options import read_options
from producers.openai_errors import Handler, with_openai_errors
from producers.request_body import check_known, read_object
from producers.shim import shim_of

FORM_ROOM_BYTES = 64 * 1024        # of an upload beside the file
MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
CREATE_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata"})
_CODES = {404: "not_found", 409: "conflict", 501: "not_supported"}


class Refused(TokenmillError):
    """A request that is right in itself but not now, or not here."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def runner_of(request: Request) -> BatchRunner:
    app: FastAPI = request.app
    runner: BatchRunner | None = getattr(app.state, "batches", None)
    if runner is None:
        raise Refused(501, "this server keeps no files: start it with --files_dir, a folder that all shims share")
    return runner


async def upload(request: Request) -> Response:
    runner, tenant = runner_of(request), _tenant(request)
    form = await _bounded(request).form(max_files=1, max_fields=8)
    try:
        for name in form:
            if name not in ("file", "purpose"):
                raise InvalidField(name[:80], "unknown field")
        if form.get("purpose") != "batch":
            raise InvalidField("purpose", f"must be batch, got {form.get('purpose')!r:.80}")
        file = _file_of(form)
        saved = await runner.files.save(new_file_id(), _chunks(file), filename=(file.filename or "upload.jsonl")[:255], purpose="batch",
                                        tenant=tenant)
    finally:
        await form.close()
    return Json(saved)


async def list_files(request: Request) -> Response:
    check_known(dict(request.query_params), frozenset({"after", "limit", "order", "purpose"}))
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidField("order", f"must be asc or desc, got {order!r:.80}")
    files, has_more = await runner_of(request).files.page(
        _tenant(request), after=request.query_params.get("after", ""), limit=_limit(request, 10_000, 10_000),
        purpose=request.query_params.get("purpose", ""), is_newest_first=order == "desc")
    return Json(_page(files, has_more))


async def show_file(request: Request) -> Response:
    return Json(await runner_of(request).files.describe(request.path_params["file_id"], _tenant(request)))


async def file_content(request: Request) -> Response:
    files, file_id = runner_of(request).files, request.path_params["file_id"]
    described = await files.describe(file_id, _tenant(request))
    return StreamingResponse(await files.content(file_id, _tenant(request)), media_type="application/octet-stream",
                             headers={"Content-Length": str(described["bytes"])})


async def delete_file(request: Request) -> Response:
    runner, file_id = runner_of(request), request.path_params["file_id"]
    await runner.files.describe(file_id, _tenant(request))
    for batch_id in await runner.batches.open_ids():
        batch = await runner.find(batch_id)
        if batch is not None and batch.asked.input_file_id == file_id and not batch.is_over:
            raise Refused(409, f"file {file_id} is the input of {batch_id}, which is {batch.status}: cancel it first")
    await runner.files.delete(file_id, _tenant(request))
    return Json({"id": file_id, "object": "file", "deleted": True})


async def create(request: Request) -> Response:
    """With an Idempotency-Key, asking again gives the same batch."""
    runner, tenant = runner_of(request), _tenant(request)
    body = await read_object(request, shim_of(request).settings.max_body_bytes)
    check_known(body, CREATE_FIELDS)
    if body.get("completion_window") != "24h":
        raise InvalidField("completion_window", f"must be 24h, got {body.get('completion_window')!r:.80}")
    asked = Asked(endpoint=check_endpoint(body.get("endpoint")), input_file_id=_text(body, "input_file_id"), tenant=tenant,
                  metadata=_metadata(body.get("metadata")))
    key = request.headers.get("idempotency-key", "")
    described = await runner.files.describe(asked.input_file_id, tenant)
    if described["purpose"] != "batch":
        raise InvalidField("input_file_id", "must be a file that was uploaded with purpose batch")
    batch = await runner.create(asked, f"{tenant}\n{key}" if key else "")
    if (batch.asked.endpoint, batch.asked.metadata) != (asked.endpoint, asked.metadata):
        raise Refused(409, f"Idempotency-Key: was used for another batch, {batch.id}")
    return Json(batch.to_object())


async def list_batches(request: Request) -> Response:
    check_known(dict(request.query_params), frozenset({"after", "limit"}))
    runner, tenant, limit = runner_of(request), _tenant(request), _limit(request, 20, 100)
    found: list[Batch] = []
    after = request.query_params.get("after", "")
    while len(found) <= limit and (ids := await runner.batches.page(after, 100)):
        after = ids[-1]
        batches = [await runner.find(batch_id) for batch_id in ids]
        found += [batch for batch in batches if batch is not None and batch.asked.tenant == tenant]
    return Json(_page([batch.to_object() for batch in found[:limit]], len(found) > limit))


async def show_batch(request: Request) -> Response:
    return Json((await _find(request)).to_object())


async def cancel_batch(request: Request) -> Response:
    """Twice is fine. What is answered by then is kept."""
    runner, batch = runner_of(request), await _find(request)
    status = await runner.batches.move(batch.id, COMES_FROM["cancelling"], "cancelling")
    if status not in ("cancelling", "cancelled"):
        raise Refused(409, f"Cannot cancel a batch with status '{status or batch.status}'.")
    return Json((await _find(request)).to_object())


async def list_parts(request: Request) -> Response:
    """Numbers of the parts that are answered; each is consecutive lines of the input. They go when the batch is over."""
    runner, batch = runner_of(request), await _find(request)
    names = await runner.files.store.names(batch_lines.part_prefix(batch.id))
    return Json({"object": "list", "status": batch.status, "data": [batch_lines.part_number(name) for name in names]})


async def show_part(request: Request) -> Response:
    """The answers of one part as JSON lines, in the order of the input, good and bad ones."""
    runner, batch, number = runner_of(request), await _find(request), request.path_params["number"]
    name = batch_lines.part_name(batch.id, int(number) if number.isdigit() and len(number) < 9 else 0)
    if await runner.files.store.size(name) is None:
        raise Refused(404, f"No part {number:.20} of {batch.id}: not answered yet, or the batch is over and its files have it")

    async def shown() -> AsyncIterator[bytes]:
        async for line in lines(runner.files.store.get(name), 1 << 62):
            if line[:1] in (b"+", b"-"):
                yield line[1:] + b"\n"

    return StreamingResponse(shown(), media_type="application/jsonl")


async def _find(request: Request) -> Batch:
    batch_id = request.path_params["batch_id"]
    batch = await runner_of(request).find(batch_id)
    if batch is None or batch.asked.tenant != _tenant(request):
        raise Refused(404, f"No batch found with id '{batch_id}'.")
    return batch


def _tenant(request: Request) -> str:
    return read_options(request.headers, shim_of(request).settings.job_class).tenant


def _text(body: dict[str, Any], name: str) -> str:
    if not isinstance(body.get(name), str):
        raise InvalidField(name, "must be a string")
    text: str = body[name]
    return text


def _limit(request: Request, default: int, most: int) -> int:
    given = request.query_params.get("limit", str(default))
    if not given.isascii() or not given.isdigit() or len(given) > 6 or not 1 <= int(given) <= most:
        raise InvalidField("limit", f"must be an integer between 1 and {most}, got {given!r:.80}")
    return int(given)


def _metadata(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > MAX_METADATA:
        raise InvalidField("metadata", f"must be an object of at most {MAX_METADATA} pairs")
    for key, value in given.items():
        if len(key) > MAX_KEY_CHARS or not isinstance(value, str) or len(value) > MAX_VALUE_CHARS:
            raise InvalidField("metadata", f"keys have at most {MAX_KEY_CHARS} characters, values are strings of at most {MAX_VALUE_CHARS}")
    return given


def _page(rows: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {"object": "list", "data": rows, "first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None,
            "has_more": has_more}


def _file_of(form: FormData) -> UploadFile:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidField("file", "must be an uploaded file")
    if (file.size or 0) > MAX_FILE_BYTES:
        raise PayloadTooLarge(file.size or 0, MAX_FILE_BYTES, "file", "of a batch")
    return file


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(CHUNK_BYTES):
        yield chunk


def _bounded(request: Request) -> Request:
    """The same request, whose body may not be longer than an upload is. The form's parser keeps files on disk."""
    limit, num_bytes = MAX_FILE_BYTES + FORM_ROOM_BYTES, 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            raise PayloadTooLarge(num_bytes, limit, "upload", "of a batch")
        return message

    return Request(request.scope, receive)


def _with_errors(handler: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except (Refused, UnknownFile) as error:
            status = error.status if isinstance(error, Refused) else 404
            body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": _CODES.get(status)}
            return Json({"error": body}, status_code=status)

    return with_openai_errors(guarded)


router = APIRouter()
for _path, _handler, _method in (
        ("/v1/files", upload, "POST"), ("/v1/files", list_files, "GET"), ("/v1/files/{file_id}", show_file, "GET"),
        ("/v1/files/{file_id}", delete_file, "DELETE"), ("/v1/files/{file_id}/content", file_content, "GET"),
        ("/v1/batches", create, "POST"), ("/v1/batches", list_batches, "GET"), ("/v1/batches/{batch_id}", show_batch, "GET"),
        ("/v1/batches/{batch_id}/cancel", cancel_batch, "POST"), ("/v1/batches/{batch_id}/parts", list_parts, "GET"),
        ("/v1/batches/{batch_id}/parts/{number}", show_part, "GET")):
    router.add_route(_path, _with_errors(_handler), methods=[_method])
