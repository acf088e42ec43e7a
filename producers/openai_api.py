"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, and answers by their id. Files and batches: batch_api.py."""

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from coordinator.answer_store import AnswerStore
from coordinator.errors import InvalidField, JobFailed, ReadElsewhere, Unavailable
from coordinator.messages import check_id, new_job_id
from producers.event_stream import open_while_connected
from producers.http_errors import Json
from producers.job_handle import JobHandle, JobResult, as_result
from producers.job_options import JobOptions, read_options
from producers.lightllm_api import sibling_ids
from producers.openai_answers import GOOD, Show
from producers.openai_errors import ModelNotFound, UnknownAnswer, openai_error, with_openai_errors
from producers.openai_plan import IDS, Kind, OpenAIPlan, Shape, plan_chat, plan_completion, with_tenant
from producers.openai_stream import ChoiceEvents, OpenAIStream, StreamOptions
from producers.request_body import read_object
from producers.shim import Shim, shim_of

PLANNERS = {"chat": plan_chat, "text": plan_completion}
STATES = {"owned": "in_progress", "queued": "queued"}


async def models(request: Request) -> Response:
    return Json({"object": "list", "data": [_model(shim_of(request))]})


async def model(request: Request) -> Response:
    shim, asked = shim_of(request), request.path_params["model"]
    if asked != shim.settings.model_name:
        raise ModelNotFound(asked, shim.settings.model_name)
    return Json(_model(shim))


async def completions(request: Request) -> Response:
    return await _answer(request, "text")


async def chat_completions(request: Request) -> Response:
    return await _answer(request, "chat")


async def show_completion(request: Request) -> Response:
    return await _show(request, "text")


async def show_chat_completion(request: Request) -> Response:
    return await _show(request, "chat")


async def forget_completion(request: Request) -> Response:
    return await _forget(request, "text")


async def forget_chat_completion(request: Request) -> Response:
    return await _forget(request, "chat")


async def _answer(request: Request, kind: Kind) -> Response:
    shim = shim_of(request)
    body = await read_object(request, shim.settings.max_body_bytes)
    plan = await PLANNERS[kind](shim, body, random.getrandbits(64))
    options = read_options(request.headers, shim.settings.job_class)
    shape = with_tenant(plan, options.tenant)
    if options.next_index and (len(plan.jobs) > 1 or not plan.asked.stream):
        raise InvalidField("Last-Event-ID", "is for streams of one choice")
    given = options.job_id
    if plan.asked.is_kept:
        given = given or new_job_id()
        await _store(shim).keep(given, shape.encode())
    handles: list[JobHandle] = []
    if plan.asked.background:
        assert given is not None
        await _submit_all(shim, plan, options, given, handles)
        for handle in handles:
            handle.close()   # nobody reads on here
        return Json(_unfinished(shape, given, "queued"), headers=_headers(handles))
    if not plan.asked.stream:
        return await _whole(shim, request, plan, shape, options, given, handles)
    await _submit_all(shim, plan, options, given, handles)
    stream = StreamOptions(request_id=given or _parent_id(handles), wants_usage=plan.asked.wants_usage,
                           next_index=options.next_index if options.is_resumable and len(handles) == 1 else None)
    events = [ChoiceEvents(_writer(request), shape, i, handle.job_id, stream) for i, handle in enumerate(handles)]
    return OpenAIStream(handles, events, shim.spawn, resume_grace_s=_grace(shim, options))


async def _whole(shim: Shim, request: Request, plan: OpenAIPlan, shape: Shape, options: JobOptions, given: str | None,
                 handles: list[JobHandle]) -> Response:
    async with open_while_connected(request.receive, handles, shim.spawn, resume_grace_s=_grace(shim, options)):
        await _submit_all(shim, plan, options, given, handles)
        results = await asyncio.gather(*(_result(shim, handle) for handle in handles))
        if plan.asked.is_kept:   # so that it can be asked for as soon as it has been given
            await asyncio.gather(*(shim.client.final_record(handle.job_id) for handle in handles))
    return Json(_writer(request).whole(shape, given or _parent_id(handles), results), headers=_headers(handles))


async def _result(shim: Shim, handle: JobHandle) -> JobResult:
    """Also when the same named job was asked for again meanwhile: both get its answer."""
    try:
        return await handle.result()
    except ReadElsewhere:
        return await shim.client.result(handle.job_id)


async def _submit_all(shim: Shim, plan: OpenAIPlan, options: JobOptions, given: str | None, handles: list[JobHandle]) -> None:
    """Appends to `handles`. What was submitted before a failure is taken back."""
    try:
        for (prompt_ids, params), job_id in zip(plan.jobs, sibling_ids(given, len(plan.jobs)), strict=True):
            handles.append(await shim.client.submit(prompt_ids, params, klass=options.klass, timeout_s=options.timeout_s, job_id=job_id,
                                                    tenant=options.tenant))
    except BaseException:
        for handle in handles:
            handle.close()
            shim.spawn(_take_back(handle, _grace(shim, options)))
        handles.clear()
        raise


async def _take_back(handle: JobHandle, grace_s: float) -> None:
    """A named job may be that of an earlier request: it is left alone if anybody reads it."""
    with contextlib.suppress(Unavailable):
        before = await handle.last_reader()
        await asyncio.sleep(grace_s)
        if not grace_s or await handle.last_reader() == before:
            await handle.cancel()


async def _show(request: Request, kind: Kind) -> Response:
    """A kept answer: its status while it is in the making, then the whole of it."""
    shim = shim_of(request)
    request_id, shape = await _kept(request, kind)
    job_ids = _job_ids(request_id, shape)
    records = await asyncio.gather(*map(shim.client.bus.get_result, job_ids))
    ended = [record for record in records if record is not None]
    if len(ended) < len(job_ids):
        return Json(_unfinished(shape, request_id, await _state(shim, job_ids)))
    results = [as_result(record) for record in ended]
    failed = next((result for result in results if result.reason not in GOOD), None)
    if failed is None:
        return Json({**_writer(request).whole(shape, request_id, results), "status": "completed"})
    status = "cancelled" if failed.reason == "cancelled" else "failed"
    return Json({**_unfinished(shape, request_id, status), **openai_error(JobFailed(failed.job_id, failed.reason, failed.error))})


async def _forget(request: Request, kind: Kind) -> Response:
    """What is not over is cancelled."""
    shim = shim_of(request)
    request_id, shape = await _kept(request, kind)
    for job_id in _job_ids(request_id, shape):
        if await shim.client.bus.get_result(job_id) is None:
            await shim.client.cancel(job_id)
    await _store(shim).forget(request_id)
    return Json({"id": IDS[kind] + request_id, "object": f"{_object(kind)}.deleted", "deleted": True})


async def _kept(request: Request, kind: Kind) -> tuple[str, Shape]:
    """Raises UnknownAnswer also for an answer of another tenant."""
    request_id = check_id("id", request.path_params["answer"].removeprefix(IDS[kind]))
    kept = await _store(shim_of(request)).get(request_id)
    shape = Shape.decode(kept) if kept is not None else None
    if shape is None or shape.kind != kind or shape.tenant != request.headers.get("x-tenant", ""):
        raise UnknownAnswer(IDS[kind] + request_id)
    return request_id, shape


async def _state(shim: Shim, job_ids: Sequence[str]) -> str:
    """Raises UnknownAnswer."""
    assert shim.client.store is not None
    known = await asyncio.gather(*map(shim.client.store.job, job_ids))
    if (lost := [job_id for job_id, job in zip(job_ids, known, strict=True) if "origin" not in job]):
        raise UnknownAnswer(lost[0])   # its request was refused
    states = {STATES.get(job.get("state", ""), "queued") for job in known}
    return "queued" if states == {"queued"} else "in_progress"


def _unfinished(shape: Shape, request_id: str, status: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": IDS[shape.kind] + request_id, "object": _object(shape.kind), "created": shape.created,
                              "model": shape.model, "status": status, "choices": [], "usage": None}
    return {**answer, "metadata": shape.metadata} if shape.metadata else answer


def _object(kind: Kind) -> str:
    return "chat.completion" if kind == "chat" else "text_completion"


def _job_ids(request_id: str, shape: Shape) -> list[str]:
    return [job_id for job_id in sibling_ids(request_id, shape.num_choices) if job_id is not None]


def _parent_id(handles: Sequence[JobHandle]) -> str:
    """Of a request without a name: the id that its jobs' ids are made of."""
    first = handles[0].job_id
    return first if len(handles) == 1 else first.removesuffix("-0")


def _headers(handles: Sequence[JobHandle]) -> dict[str, str]:
    return {"X-Job-Id": ", ".join(handle.job_id for handle in handles)}


def _grace(shim: Shim, options: JobOptions) -> float:
    return shim.settings.resume_grace_s if options.is_resumable else 0.0


def _store(shim: Shim) -> AnswerStore:
    assert shim.client.store is not None
    return AnswerStore(shim.client.store)


def _writer(request: Request) -> Show:
    """One per app: made when it is first needed."""
    state = request.app.state
    if not hasattr(state, "openai_show"):
        state.openai_show = Show(shim_of(request).admission.tokenizer)
    show: Show = state.openai_show
    return show


def _model(shim: Shim) -> dict[str, Any]:
    config = Path(shim.settings.model_dir) / "config.json"
    created = int(config.stat().st_mtime) if config.is_file() else int(time.time())
    return {"id": shim.settings.model_name, "object": "model", "created": created, "owned_by": "tokenmill",
            "max_model_len": shim.admission.max_req_total_len}


router = APIRouter()
for _path, _handler, _method in (
        ("/v1/models", models, "GET"), ("/v1/models/{model:path}", model, "GET"), ("/v1/completions", completions, "POST"),
        ("/v1/chat/completions", chat_completions, "POST"), ("/v1/completions/{answer}", show_completion, "GET"),
        ("/v1/completions/{answer}", forget_completion, "DELETE"), ("/v1/chat/completions/{answer}", show_chat_completion, "GET"),
        ("/v1/chat/completions/{answer}", forget_chat_completion, "DELETE")):
    router.add_route(_path, with_openai_errors(_handler), methods=[_method])
