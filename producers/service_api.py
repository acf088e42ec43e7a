"""What operators and load balancers ask: liveness, readiness, load, and where the queue is."""

import asyncio
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from coordinator.errors import InvalidField
from coordinator.queue_record import QueueUrls, read_record
from coordinator.queue_users import ROLES
from producers.http_errors import Json
from producers.metrics import CONTENT_TYPE_LATEST
from producers.shim import shim_of


async def liveness(request: Request) -> Response:
    """This process runs; nothing else is looked at."""
    return Json({"status": "ok"})


async def readiness(request: Request) -> Response:
    """NATS and Redis answer, and live workers can take a job from prompt to last token. Else 503 with what is missing."""
    missing = await shim_of(request).what_is_missing()
    if missing is None:
        return Json({"status": "ok"})
    return Json({"status": "error", "message": missing}, status_code=503)


async def health(request: Request) -> Response:
    is_ready = await shim_of(request).what_is_missing() is None
    return Json({"message": "Ok" if is_ready else "Error"}, status_code=200 if is_ready else 503)


async def model_name(request: Request) -> Response:
    return Json({"model_name": shim_of(request).settings.model_name})


async def token_load(request: Request) -> Response:
    """Shares of the KV pools of all live workers: in use now, and in use once everything admitted has grown to its end."""
    num_pages = num_used = num_spoken_for = 0.0
    for view in await shim_of(request).live_workers():
        stats = view.stats
        total = int(stats.get("total_pages", 0))
        tokens_per_page = int(view.info.get("max_total_tokens", 0)) / total if total else 0.0
        num_pages += total
        num_used += total - int(stats.get("free_pages", 0)) - int(stats.get("cached_pages", 0))
        num_spoken_for += total - (int(stats.get("free_tokens", 0)) / tokens_per_page if tokens_per_page else 0.0)
    current = min(1.0, max(0.0, num_used / num_pages)) if num_pages else 0.0
    dynamic = min(1.0, max(current, num_spoken_for / num_pages)) if num_pages else 0.0
    return Json({"current_load": current, "logical_max_load": dynamic, "dynamic_max_load": dynamic})


async def metrics(request: Request) -> Response:
    """Prometheus text: what this shim saw of its jobs, and the farm's queues, workers and KV pages."""
    shim = shim_of(request)
    return Response(await shim.metrics.scrape(shim, shim.client.num_open), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def bootstrap(request: Request) -> Response:
    """Workers that know only this door ask here for the queue; `role` names whose password they get (worker, master, client, operator)."""
    settings, role = shim_of(request).settings, request.query_params.get("role", "worker")
    if role not in ROLES:
        raise InvalidField("role", f"must be one of {', '.join(ROLES)}, got {role!r:.40}")
    record = await asyncio.to_thread(read_record, Path(settings.queue_record)) if settings.queue_record else None
    urls = record.urls(role, request.url.hostname or "") if record else QueueUrls(nats_url=settings.nats_url, redis_url=settings.redis_url)
    return Json({"nats_url": urls.nats_url, "redis_url": urls.redis_url, "model_name": settings.model_name})


router = APIRouter()
router.add_route("/liveness", liveness, methods=["GET", "POST"])
router.add_route("/readiness", readiness, methods=["GET", "POST"])
router.add_route("/health", health, methods=["GET"])     # HEAD comes with GET
router.add_route("/healthz", health, methods=["GET"])
router.add_route("/get_model_name", model_name, methods=["GET", "POST"])
router.add_route("/token_load", token_load, methods=["GET"])
router.add_route("/metrics", metrics, methods=["GET"])
router.add_route("/bootstrap", bootstrap, methods=["GET"])
