"""A job by its id, at any shim: GET /jobs/{id}, GET /jobs/{id}/stream (with Last-Event-ID), DELETE /jobs/{id}."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from coordinator.errors import UnknownJob
from coordinator.messages import FinalRecord, check_id
from producers.event_stream import EventStream
from producers.http_errors import Json
from producers.job_options import read_options
from producers.lightllm_shapes import StreamEvents, record_object
from producers.shim import Shim, shim_of


async def show(request: Request) -> Response:
    """State `queued`, `running` or `done`; with the whole answer when it is done."""
    shim, job_id = shim_of(request), check_id("job_id", request.path_params["job_id"])
    record = await shim.client.bus.get_result(job_id)
    if record is not None:
        return Json(_finished(record))
    known = await _known(shim, job_id)
    return Json({"job_id": job_id, "state": "running" if known.get("state") == "owned" else "queued",
                 "cancelled": known.get("cancelled") == "1"})


async def stream(request: Request) -> Response:
    """The tokens after Last-Event-ID (all of them without), as /generate_stream sends them, each with its index as `id:`."""
    shim = shim_of(request)
    options = read_options(request.headers, shim.settings.job_class)
    handle = await shim.client.follow(request.path_params["job_id"])
    events = StreamEvents(shim.admission.tokenizer.special_ids, handle.num_prompt_tokens, options.next_index)
    return EventStream(handle, events, shim.spawn, resume_grace_s=shim.settings.resume_grace_s)


async def cancel(request: Request) -> Response:
    """Stop it, wherever it is. Asking twice, or for a job that is over, is fine."""
    shim, job_id = shim_of(request), check_id("job_id", request.path_params["job_id"])
    if await shim.client.bus.get_result(job_id) is not None:
        return Json({"job_id": job_id, "state": "done"})
    await _known(shim, job_id)
    await shim.client.cancel(job_id)
    return Json({"job_id": job_id, "state": "cancelling"})


async def _known(shim: Shim, job_id: str) -> dict[str, str]:
    assert shim.client.store is not None
    known = await shim.client.store.job(job_id)
    if "origin" not in known:
        raise UnknownJob(job_id)
    return known


def _finished(record: FinalRecord) -> dict[str, Any]:
    return {**record_object(record), "state": "done", "workers": list(record.workers)}


router = APIRouter()
router.add_route("/jobs/{job_id}", show, methods=["GET"])
router.add_route("/jobs/{job_id}", cancel, methods=["DELETE"])
router.add_route("/jobs/{job_id}/stream", stream, methods=["GET"])
