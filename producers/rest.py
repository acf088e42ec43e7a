"""The REST door of a farm. `python -m producers.rest --nats_url … --redis_url … --model_dir … --port …`

Stateless: any number of these may run. Each API is a router in a file of its own; tokens on their way to a client touch no model class.
"""

import asyncio
import contextlib
import logging
import math
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from coordinator import lifeline
from coordinator.collector import settle
from coordinator.errors import TokenmillError
from producers import batch_api, http_errors, jobs_api, lightllm_api, openai_api, openapi_page, service_api
from producers.access import Access
from producers.api_keys import KeyRing
from producers.batch_runner import BatchRunner
from producers.file_store import DirectoryStore
from producers.metrics import CountResponses, Metrics
from producers.settings import RestSettings, parse
from producers.shim import Shim

try:
    import uvloop
except ImportError:  # Windows
    uvloop = None  # type: ignore[assignment]

BACKLOG = 4096
ROUTERS = (openapi_page.router, service_api.router, jobs_api.router, lightllm_api.router, openai_api.router, batch_api.router)


def create_app(settings: RestSettings) -> FastAPI:
    """For any ASGI server. Connects when it starts (lifespan); raises there what Shim.open raises."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.shim = shim = await _open_shim(app, settings)
        try:
            yield
        finally:
            await shim.close()

    return _build(settings, lifespan)


def _build(settings: RestSettings, lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]] | None) -> FastAPI:
    """Raises ConfigError for a file of API keys that cannot be read."""
    app = FastAPI(title="tokenmill", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.metrics = metrics = Metrics()
    app.state.keys = keys = KeyRing(Path(settings.api_keys_file)) if settings.api_keys_file else None
    http_errors.install(app)
    # The middleware that is added last sees a request first.
    app.add_middleware(Access, keys=keys, max_body_bytes=settings.max_body_bytes, cluster_token=settings.cluster_token)
    if settings.cors_origins:
        origins = [origin.strip() for origin in settings.cors_origins.split(",")]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["X-Job-Id"])
    app.add_middleware(CountResponses, metrics=metrics)
    for router in ROUTERS:
        app.include_router(router)
    return app


async def _open_shim(app: FastAPI, settings: RestSettings, on_fatal: Callable[[Exception], None] | None = None) -> Shim:
    keys: KeyRing | None = app.state.keys
    files = DirectoryStore(Path(settings.files_dir)) if settings.files_dir else None
    shim = await Shim.open(settings, app.state.metrics, on_fatal, keys.limits_of if keys is not None else None)
    if files is not None:
        app.state.batches = BatchRunner(shim, files, settings.batch_window)
        shim.on_close.append(app.state.batches.close)
        app.state.batches.start()
    return shim


async def serve(settings: RestSettings) -> None:
    """Until SIGTERM or SIGINT; running answers then get `shutdown_grace_s` to end. Raises ConfigError, Unavailable."""
    app = _build(settings, None)
    server = uvicorn.Server(uvicorn.Config(
        app, host=settings.host, port=settings.port, http="httptools", ws="none", lifespan="off", access_log=settings.access_log,
        log_level=settings.log_level, log_config=None, server_header=False, backlog=BACKLOG,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s), ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None))
    faults: list[Exception] = []

    def on_fatal(error: Exception) -> None:
        faults.append(error)
        server.should_exit = True

    def on_signal(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    app.state.shim = shim = await _open_shim(app, settings, on_fatal)
    settle()
    try:
        # uvicorn has handlers of its own while it serves; after that it raises the signal again, which must not end us unclosed.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        await server.serve()
    finally:
        await shim.close()
    if faults:
        raise faults[0]


def main(argv: list[str] | None = None) -> int:
    lifeline.hold_on()
    settings = parse(argv)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run = asyncio.run if uvloop is None else uvloop.run
    try:
        run(serve(settings))
    except TokenmillError as error:
        print(f"REST shim: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
