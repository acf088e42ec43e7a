"""LightLLM's API: POST /generate, /generate_stream, / (with `stream`), GET or POST /tokens; POST /get_score is refused."""

import asyncio
import random
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from coordinator.errors import InvalidField, JobFailed, ReadElsewhere
from coordinator.messages import new_job_id
from coordinator.sampling import SamplingParams
from producers.admission import split
from producers.event_stream import EventStream, open_while_connected
from producers.http_errors import Json
from producers.job_handle import JobHandle, JobResult
from producers.job_options import JobOptions, read_options
from producers.lightllm_shapes import StreamEvents, as_ours, generate_object
from producers.request_body import check_known, read_object
from producers.shim import Shim, shim_of

GENERATE_FIELDS = frozenset({"inputs", "parameters", "multimodal_params"})
TOKENS_FIELDS = frozenset({"text", "parameters", "multimodal_params"})


async def generate(request: Request) -> Response:
    shim = shim_of(request)
    return await _generate(shim, await read_object(request, shim.settings.max_body_bytes), request)


async def generate_stream(request: Request) -> Response:
    shim = shim_of(request)
    return await _generate_stream(shim, await read_object(request, shim.settings.max_body_bytes), request)


async def generate_either(request: Request) -> Response:
    """`stream` in the body says which of the two."""
    shim = shim_of(request)
    body = await read_object(request, shim.settings.max_body_bytes)
    is_stream = body.pop("stream", False)
    if not isinstance(is_stream, bool):
        raise InvalidField("stream", f"must be true or false, got {is_stream!r:.80}")
    return await (_generate_stream(shim, body, request) if is_stream else _generate(shim, body, request))


async def tokens(request: Request) -> Response:
    """How many tokens a text has."""
    shim = shim_of(request)
    body = await read_object(request, shim.settings.max_body_bytes)
    check_known(body, TOKENS_FIELDS)
    _refuse_multimodal(body)
    params = shim.admission.params(as_ours(_object(body, "parameters")))
    if not isinstance(body.get("text"), str):
        raise InvalidField("text", "must be a string")
    prompt_ids = await shim.admission.encode(body["text"], params, field="text")
    return Json({"ntokens": len(prompt_ids)})


async def _generate(shim: Shim, body: dict[str, Any], request: Request) -> Response:
    params, prompt_ids, with_details = await admit(shim, body)
    options = read_options(request.headers, shim.settings.job_class)
    handles: list[JobHandle] = []
    async with open_while_connected(request.receive, handles, shim.spawn, resume_grace_s=_grace(shim, options)):
        for child, job_id in zip(split(params, random.getrandbits(64)), sibling_ids(options.job_id, params.n), strict=True):
            await _submit(shim, prompt_ids, child, options, job_id, handles)
        results = await asyncio.gather(*(_whole(shim, handle) for handle in handles))
    for result in results:
        if result.reason not in ("stop", "length"):
            raise JobFailed(result.job_id, result.reason, result.error)
    answer = generate_object(results, shim.admission.tokenizer, num_prompt_tokens=len(prompt_ids), with_details=with_details)
    return Json(answer, headers={"X-Job-Id": ", ".join(result.job_id for result in results)})


async def _whole(shim: Shim, handle: JobHandle) -> JobResult:
    """Also when the same named job was asked for again meanwhile: both get its answer."""
    try:
        return await handle.result()
    except ReadElsewhere:
        return await shim.client.result(handle.job_id)


async def _generate_stream(shim: Shim, body: dict[str, Any], request: Request) -> Response:
    params, prompt_ids, _ = await admit(shim, body, is_stream=True)
    if params.n != 1:
        raise InvalidField("best_of", f"must be 1 for a stream, got {params.n}")
    options = read_options(request.headers, shim.settings.job_class)
    handles: list[JobHandle] = []
    await _submit(shim, prompt_ids, split(params, random.getrandbits(64))[0], options, options.job_id, handles)
    events = StreamEvents(shim.admission.tokenizer.special_ids, len(prompt_ids), options.next_index if options.is_resumable else None)
    return EventStream(handles[0], events, shim.spawn, resume_grace_s=_grace(shim, options))


async def get_score(request: Request) -> Response:
    return Json({"message": "/get_score: reward models are not supported by this version"}, status_code=400)


def sibling_ids(given: str | None, n: int) -> list[str | None]:
    """Job ids of the n answers to one request: the request's own for one answer, `<id>-0`, `<id>-1`, … for several."""
    if n == 1:
        return [given]
    parent = given or new_job_id()
    return [f"{parent}-{i}" for i in range(n)]


async def _submit(shim: Shim, prompt_ids: tuple[int, ...], params: SamplingParams, options: JobOptions, job_id: str | None,
                  handles: list[JobHandle]) -> None:
    """Appends to `handles`, so that what was submitted before a failure can be taken back."""
    handles.append(await shim.client.submit(prompt_ids, params, klass=options.klass, timeout_s=options.timeout_s, job_id=job_id,
                                            tenant=options.tenant))


def _grace(shim: Shim, options: JobOptions) -> float:
    return shim.settings.resume_grace_s if options.is_resumable else 0.0


async def admit(shim: Shim, body: dict[str, Any], *, is_stream: bool = False) -> tuple[SamplingParams, tuple[int, ...], bool]:
    """(parameters, prompt ids, whether details are wanted)."""
    check_known(body, GENERATE_FIELDS)
    _refuse_multimodal(body)
    if "inputs" not in body:
        raise InvalidField("inputs", "is missing")
    given = _object(body, "parameters")
    with_details = given.pop("return_details", None)
    with_details = False if with_details is None else with_details
    if not isinstance(with_details, bool):
        raise InvalidField("return_details", f"must be true or false, got {with_details!r:.80}")
    params = shim.admission.params(as_ours(given))
    if params.top_logprobs and not (with_details or is_stream):
        raise InvalidField("top_logprobs", "are shown in the details: return_details must be true")
    return params, await shim.admission.prompt(body["inputs"], params), with_details


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    given = body.get(name)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidField(name, "must be an object")
    return given


def _refuse_multimodal(body: dict[str, Any]) -> None:
    if any(_object(body, "multimodal_params").values()):
        raise InvalidField("multimodal_params", "images and audio are not supported: this model takes text only")


router = APIRouter()
router.add_route("/generate", generate, methods=["POST"])
router.add_route("/generate_stream", generate_stream, methods=["POST"])
router.add_route("/", generate_either, methods=["POST"])
router.add_route("/get_score", get_score, methods=["POST"])
router.add_route("/tokens", tokens, methods=["GET", "POST"])
