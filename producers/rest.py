"""The REST door of a farm. `python -m producers.rest --nats_url … --redis_url … --model_dir … --port …`

Stateless: any number of these may run. Each API is a router in a file of its own; tokens on their way to a client touch no model class.
"""

import contextlib
import logging
import sys
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI

from coordinator import lifeline
from coordinator.errors import TokenmillError
from producers import http_errors, lightllm_api, service_api
from producers.settings import RestSettings, parse
from producers.shim import Shim

log = logging.getLogger(__name__)

ROUTERS = (service_api.router, lightllm_api.router)


def create_app(settings: RestSettings) -> FastAPI:
    """Connects when it starts (lifespan); raises there what Shim.open raises."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.shim = shim = await Shim.open(settings)
        try:
            yield
        finally:
            await shim.close()

    app = FastAPI(title="tokenmill", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    http_errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def make_server(settings: RestSettings) -> uvicorn.Server:
    """The web server, not yet listening. SIGTERM lets running answers end, for `shutdown_grace_s`."""
    return uvicorn.Server(uvicorn.Config(
        create_app(settings), host=settings.host, port=settings.port, loop="auto", http="httptools", ws="none",
        access_log=settings.access_log, log_level=settings.log_level, log_config=None, server_header=False, date_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s), backlog=4096))


def main(argv: list[str] | None = None) -> int:
    lifeline.hold_on()
    settings = parse(argv)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    server = make_server(settings)
    try:
        server.run()
    except TokenmillError as error:
        print(f"REST shim: {error}", file=sys.stderr)
        return 1
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
