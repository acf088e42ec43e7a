"""What all API routers of one REST process share: the client, the limits, the health of the farm."""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self

from fastapi import FastAPI
from starlette.requests import Request

from coordinator.bus import Counters
from coordinator.errors import Unavailable
from coordinator.members import Membership
from coordinator.planner import Objectives
from coordinator.planning import Planning
from coordinator.routing import RoutingPolicy
from coordinator.store import AdmissionLimits, WorkerView
from coordinator.tokenizer import Tokenizer
from coordinator.watcher import Watcher
from producers.admission import Admission, longest_request, model_defaults
from producers.ask import Responder
from producers.client import TokenmillClient
from producers.metrics import Metrics
from producers.open_work import LimitsOf
from producers.settings import RestSettings

VIEW_FRESH_S = 0.5    # health checks may come from many sides: one look serves them all for this long
PING_TIMEOUT_S = 1.0


class Shim:
    """One per process, in `app.state.shim`. `open` connects, `close` lets go."""

    def __init__(self, settings: RestSettings, admission: Admission, client: TokenmillClient, metrics: Metrics) -> None:
        self.settings = settings
        self.admission = admission
        self.client = client
        self.metrics = client.observer = metrics
        self.on_close: list[Callable[[], Awaitable[None]]] = []     # what works on top of the shim ends before it
        self._background: set[asyncio.Task[None]] = set()
        self._view: tuple[float, list[WorkerView]] | None = None
        self._view_turn = asyncio.Lock()
        assert client.store is not None
        self._asks = Responder(client, admission, self.spawn)
        self._watcher = Watcher(client.bus, client.store, client.origin)
        self._membership = Membership(client.store, client.origin, self._said_to_others)
        self._planning = Planning(client.bus, client.store, client.origin, settings.planner, Objectives(
            ttft_s=settings.ttft_objective, tpot_s=settings.tpot_objective))

    @classmethod
    async def open(cls, settings: RestSettings, metrics: Metrics, on_fatal: Callable[[Exception], None] | None = None,
                   limits_of: LimitsOf | None = None) -> Self:
        """`on_fatal` is told if NATS closes the connection for good; `limits_of` knows tenants. Raises ConfigError, Unavailable."""
        defaults = model_defaults(settings.model_dir)
        tokenizer = await asyncio.to_thread(Tokenizer.from_dir, settings.model_dir)
        limit = longest_request(settings.max_req_total_len, settings.model_dir)
        admission = Admission(tokenizer=tokenizer, defaults=defaults, max_req_total_len=limit)
        client = await TokenmillClient.connect(settings.nats_url, settings.redis_url, model=settings.model_name,
                                               max_queued=settings.max_queued, submit_timeout_s=settings.submit_timeout_s,
                                               on_fatal=on_fatal, limits_of=limits_of, routing=RoutingPolicy(
                                                   prefix_affinity=settings.prefix_affinity == "on",
                                                   disagg_min_tokens=settings.disagg_min_tokens), limits=AdmissionLimits(
                                                   max_class_tokens=settings.max_queued_tokens, max_tenant_jobs=settings.max_tenant_jobs,
                                                   max_tenant_tokens=settings.max_tenant_tokens))
        shim = cls(settings, admission, client, metrics)
        shim._watcher.start()
        shim._membership.start()
        shim._planning.start()
        await shim._asks.open()
        return shim

    async def close(self) -> None:
        for close in self.on_close:
            await close()
        await self._asks.close()
        if self._background:
            await asyncio.wait(self._background, timeout=PING_TIMEOUT_S)
        await self._planning.close()
        await self._membership.close()
        await self._watcher.close()
        await self.client.close()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something go on after its request has ended."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _said_to_others(self) -> dict[str, Any]:
        settings = self.settings
        return {"kind": "pd_master", "url": f"{'https' if settings.tls_cert else 'http'}://{settings.host}:{settings.port}",
                "model": self.client.model, "host": socket.gethostname(), "pid": os.getpid(), "open_jobs": self.client.num_open,
                **self.metrics.recent.summary()}

    async def live_workers(self) -> list[WorkerView]:
        """This model's workers whose lease holds. Raises Unavailable when NATS or Redis does not answer."""
        assert self.client.store is not None
        async with self._view_turn:
            if self._view is None or time.monotonic() > self._view[0] + VIEW_FRESH_S:
                if not self.client.bus.is_connected:
                    raise Unavailable("NATS cannot be reached")
                await self.client.bus.flush(PING_TIMEOUT_S)
                views = await self.client.store.workers(self.client.model)
                self._view = (time.monotonic(), [view for view in views if view.is_alive])
            return self._view[1]

    async def counters(self) -> Counters:
        """Depths of this model's queues. Raises Unavailable."""
        return await self.client.bus.counters(self.client.model)

    async def what_is_missing(self) -> str | None:
        """None when a job that came now would be answered."""
        try:
            roles = {view.role for view in await self.live_workers()}
        except Unavailable as error:
            return str(error)
        if "both" in roles or {"prefill", "decode"} <= roles:
            return None
        missing = [role for role in ("prefill", "decode") if role not in roles]
        return f"no live worker of role {' and none of role '.join(missing)} (nor of role both) for model {self.settings.model_name}"


def shim_of(request: Request) -> Shim:
    app: FastAPI = request.app
    shim: Shim = app.state.shim
    return shim
