"""GET /metrics in Prometheus' text format. What LightLLM measures too has LightLLM's name, so that its dashboards go on working.

A job costs a handful of observations when it ends, a token none. The farm's own counters (queues, workers, KV pages) are asked at a
scrape, at most once a second, and are the same at every shim: take their maximum, not their sum, over shims.
"""

import asyncio
import time
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.bus import Counters
from coordinator.errors import TokenmillError
from coordinator.messages import CLASSES
from coordinator.status import totals
from coordinator.store import WorkerView
from producers.job_handle import JobHandle
from producers.recent_times import RecentTimes

__all__ = ["CONTENT_TYPE_LATEST", "CountResponses", "Metrics"]

FRESH_S = 1.0
SECONDS = tuple(0.001 * 1.5**i for i in range(1, 36))      # LightLLM's: 1.5 ms to 24 minutes
TOKENS = tuple(float(2**i) for i in range(18))
SCRAPE_TIMEOUT_S = 3.0


class FarmView(Protocol):
    """What a scrape asks of the farm; the shim is one."""

    async def live_workers(self) -> list[WorkerView]: ...
    async def counters(self) -> Counters: ...


class Metrics:
    """One registry per shim. `submitted` and `ended` are told by the client."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.recent = RecentTimes()
        self._view_until_s = 0.0
        self._turn = asyncio.Lock()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        self._first_token = histogram("lightllm_request_first_token_duration", "Submit to first token (s)", SECONDS)
        self._per_token = histogram("lightllm_request_mean_time_per_token_duration", "Mean time per token after the first (s)", SECONDS)
        self._duration = histogram("lightllm_request_duration", "Submit to last token (s)", SECONDS)
        self._input_length = histogram("lightllm_request_input_length", "Prompt tokens", TOKENS)
        self._generated = histogram("lightllm_request_generated_tokens", "Generated tokens", TOKENS)
        self._cache_length = histogram("lightllm_cache_length", "Prompt tokens found in the prefix cache", TOKENS)
        self._count = Counter("lightllm_request_count", "Jobs accepted", registry=registry)
        self._success = Counter("lightllm_request_success", "Jobs that ended with their whole answer", registry=registry)
        self._failure = Counter("lightllm_request_failure", "Jobs that ended otherwise", registry=registry)
        self._ended = Counter("tokenmill_jobs_ended", "Jobs by how they ended", ["reason"], registry=registry)
        self._tokens = Counter("tokenmill_tokens", "Tokens of jobs that ended", ["kind"], registry=registry)
        self.responses = Counter("tokenmill_http_responses", "Responses by surface and status", ["surface", "status"], registry=registry)
        self._open = gauge("tokenmill_open_jobs", "Jobs whose answer this shim reads")
        self._is_visible = gauge("tokenmill_farm_visible", "1 if NATS and Redis answered this scrape; else what follows is old")
        self._queue = gauge("tokenmill_queue_jobs", "Jobs in the queue by class: waiting, or given to a worker", "class", "state")
        self._handoffs = gauge("tokenmill_handoffs", "KV handles offered and not yet taken")
        self._dead_letters = gauge("tokenmill_dead_letters", "Jobs that were withdrawn")
        self._workers = gauge("tokenmill_workers", "Workers whose lease holds", "role")
        self._pages = gauge("tokenmill_kv_pages", "KV pages of all live workers", "state")
        self._queue_size = gauge("lightllm_queue_size", "Jobs that wait, in the queue and in workers")
        self._batch_size = gauge("lightllm_batch_current_size", "Sequences that run")
        self._utilization = gauge("lightllm_kv_cache_utilization_ratio", "Share of KV pages in use")

    def submitted(self) -> None:
        self._count.inc()

    def ended(self, handle: JobHandle) -> None:
        """A job that was submitted here is over."""
        finish, num_tokens, timing = handle.finish, handle.tokens.next_index, handle.timing
        if finish is None or timing is None:
            return
        now = time.monotonic()
        is_whole = finish.reason in ("stop", "length")
        (self._success if is_whole else self._failure).inc()
        self._ended.labels(finish.reason).inc()
        self._tokens.labels("prompt").inc(finish.prompt_tokens)
        self._tokens.labels("cached").inc(finish.cached_tokens)
        self._tokens.labels("generated").inc(num_tokens)
        if not is_whole or timing.first_token_s is None:
            return
        self._first_token.observe(timing.first_token_s - timing.submitted_s)
        self._duration.observe(now - timing.submitted_s)
        per_token_s = (now - timing.first_token_s) / (num_tokens - 1) if num_tokens > 1 else None
        if per_token_s is not None:
            self._per_token.observe(per_token_s)
        self.recent.add(timing.first_token_s - timing.submitted_s, per_token_s)
        self._input_length.observe(finish.prompt_tokens)
        self._generated.observe(num_tokens)
        self._cache_length.observe(finish.cached_tokens)

    async def scrape(self, farm: FarmView, num_open: int) -> bytes:
        """The text. A farm that cannot be asked shows as tokenmill_farm_visible 0."""
        self._open.set(num_open)
        async with self._turn:
            if time.monotonic() > self._view_until_s:
                await self._look(farm)
                self._view_until_s = time.monotonic() + FRESH_S
        return generate_latest(self.registry)

    async def _look(self, farm: FarmView) -> None:
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                workers, counters = await farm.live_workers(), await farm.counters()
        except (TokenmillError, TimeoutError):
            self._is_visible.set(0)
            return
        self._is_visible.set(1)
        self._show_queue(counters)
        self._show_workers(workers, sum(counters["jobs_pending"].values()))

    def _show_queue(self, counters: Counters) -> None:
        for klass in CLASSES:
            self._queue.labels(klass, "waiting").set(counters["jobs_pending"][klass])
            self._queue.labels(klass, "given").set(counters["jobs_ack_pending"][klass])
        self._handoffs.set(counters["handoff"])
        self._dead_letters.set(counters["dlq"])

    def _show_workers(self, workers: list[WorkerView], num_queued: int) -> None:
        for role in ("prefill", "decode", "both"):
            self._workers.labels(role).set(sum(view.role == role for view in workers))
        pages = {name: sum(int(view.stats.get(f"{name}_pages", 0)) for view in workers) for name in ("total", "free", "cached", "held")}
        for name, value in pages.items():
            self._pages.labels(name).set(value)
        held = totals(workers)
        self._pages.labels("pinned").set(held["pinned"])
        self._batch_size.set(held["running"])
        self._queue_size.set(num_queued + held["waiting"])
        self._utilization.set((pages["total"] - pages["free"] - pages["cached"]) / pages["total"] if pages["total"] else 0.0)


class CountResponses:
    """ASGI middleware: responses by surface and status. Outermost, so that refusals count too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._responses = app, metrics.responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        surface = "openai" if scope["path"].startswith("/v1/") else "lightllm"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._responses.labels(surface, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
