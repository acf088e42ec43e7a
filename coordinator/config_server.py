"""`python -m coordinator.config_server`: tells whoever shows the cluster token where the queue is, and who is in the farm.

    GET /bootstrap?role=…   worker, master, client, operator: URLs of NATS and Redis with that role's password
                            config_server: all of it, for another config server (--join)
    GET /registry           config servers, masters and workers, as Redis knows them
    GET /status?model=…     what `tokenmill status --json` prints
    GET /liveness /readiness /health

Stateless: the record of the queue is a file, everything else is in Redis. Any number may run; all of them know the same.
"""

import argparse
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coordinator import lifeline
from coordinator.bus import Bus
from coordinator.cluster_token import ENV, is_shown
from coordinator.errors import ConfigError, TokenmillError, Unavailable
from coordinator.farm_access import FarmAccess
from coordinator.members import Membership, members
from coordinator.planner import Objectives
from coordinator.planning import Mode, Planning
from coordinator.queue_record import QueueRecord, read_record
from coordinator.queue_users import ROLES
from coordinator.registry import registry
from coordinator.status import collect
from coordinator.store import Store
from coordinator.watcher import Watcher

log = logging.getLogger(__name__)

NAME_BYTES = 4
READ_TIMEOUT_S = 2.0


class ConfigServer:
    """One process: its door, its view of Redis, and the watcher that it runs like every other process of the farm."""

    def __init__(self, record_path: Path, url: str, token: str, planner: Mode, objectives: Objectives) -> None:
        self._record_path, self._url, self._token, self._planner, self._objectives = record_path, url, token, planner, objectives
        self._name = f"config-{os.urandom(NAME_BYTES).hex()}"
        self._started_at = time.time()
        self._bus: Bus | None = None
        self._store: Store | None = None

    def app(self) -> Starlette:
        routes = [Route("/bootstrap", self.bootstrap), Route("/registry", self.registry), Route("/status", self.status),
                  Route("/liveness", self.liveness), Route("/readiness", self.readiness), Route("/health", self.readiness)]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @property
    def record(self) -> QueueRecord:
        """Read again each time: the queue may have been started anew meanwhile."""
        record = read_record(self._record_path)
        if record is None:
            raise ConfigError(f"{self._record_path} is gone")
        return record

    async def bootstrap(self, request: Request) -> Response:
        role = request.query_params.get("role", "worker")
        if (denied := self._denied(request)) is not None:
            return denied
        seen_as = request.url.hostname or ""
        if role == "config_server":
            return JSONResponse({"record": _as_seen(self.record, seen_as)})
        if role not in ROLES:
            return JSONResponse({"message": f"role: must be one of {', '.join(ROLES)}, config_server, got {role!r:.40}"}, 400)
        urls = self.record.urls(role, seen_as)
        return JSONResponse({"nats_url": urls.nats_url, "redis_url": urls.redis_url, "model_name": await self._only_model()})

    async def registry(self, request: Request) -> Response:
        if (denied := self._denied(request)) is not None:
            return denied
        assert self._store is not None
        try:
            return JSONResponse(await registry(self._store))
        except Unavailable as error:
            return JSONResponse({"message": str(error)}, 503)

    async def status(self, request: Request) -> Response:
        if (denied := self._denied(request)) is not None:
            return denied
        assert self._bus is not None and self._store is not None
        try:
            model = request.query_params.get("model") or await self._only_model()
            if not model:
                return JSONResponse({"message": "model: name one of the models in /registry"}, 400)
            return JSONResponse(await collect(FarmAccess(self._bus, self._store, model)))
        except Unavailable as error:
            return JSONResponse({"message": str(error)}, 503)

    async def liveness(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """NATS and Redis answer."""
        assert self._bus is not None and self._store is not None
        try:
            await self._store.ping()
            await self._bus.flush(READ_TIMEOUT_S)
        except Unavailable as error:
            return JSONResponse({"status": "error", "message": str(error)}, 503)
        return JSONResponse({"status": "ok"})

    def _denied(self, request: Request) -> Response | None:
        if not self._token or is_shown(request.headers.get("authorization", ""), self._token):
            return None
        return JSONResponse({"message": "the cluster token is needed: Authorization: Bearer …"}, 401, {"WWW-Authenticate": "Bearer"})

    async def _only_model(self) -> str:
        """The farm's model, if it has exactly one."""
        assert self._store is not None
        with contextlib.suppress(Unavailable):
            infos = [view.info for view in await members(self._store) if view.is_alive]
            infos += [view.info for view in await self._store.workers() if view.is_alive]
            models = {str(info["model"]) for info in infos if info.get("model")}
            return models.pop() if len(models) == 1 else ""
        return ""

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        urls = self.record.urls("master")
        self._store = Store(urls.redis_url)
        self._bus = await Bus.connect(urls.nats_url, self._name)
        watcher = Watcher(self._bus, self._store, self._name)
        membership = Membership(self._store, self._name, self._info)
        planning = Planning(self._bus, self._store, self._name, self._planner, self._objectives)
        for part in (watcher, membership, planning):
            part.start()
        try:
            yield
        finally:
            for part in (planning, membership, watcher):
                await part.close()
            await self._bus.close()
            await self._store.close()

    def _info(self) -> dict[str, Any]:
        return {"kind": "config_server", "url": self._url, "host": socket.gethostname(), "pid": os.getpid(), "since": self._started_at}


def _as_seen(record: QueueRecord, seen_as: str) -> dict[str, Any]:
    """For another machine: the queue is where the asker found us, and not with the asker."""
    host = record.urls("master", seen_as).nats_url.rpartition("@")[2].rpartition("/")[2].rpartition(":")[0].strip("[]")
    return {"host": host, "nats_port": record.nats_port, "redis_port": record.redis_port, "passwords": record.passwords,
            "nats_scheme": record.nats_scheme, "given": record.given, "is_here": False}


def main(argv: list[str] | None = None) -> int:
    lifeline.hold_on()
    parser = argparse.ArgumentParser(prog="coordinator.config_server", description="Bootstrap and registry of a farm.", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=60088)
    parser.add_argument("--record", required=True, help="file that says where the queue is (queue_record.py)")
    parser.add_argument("--tls_cert", default="")
    parser.add_argument("--tls_key", default="")
    parser.add_argument("--planner", choices=["off", "advise", "act"], default="off")
    parser.add_argument("--ttft_objective", type=float, default=2.0)
    parser.add_argument("--tpot_objective", type=float, default=0.1)
    parser.add_argument("--log_level", default="warning")
    flags = parser.parse_args(argv)
    logging.basicConfig(level=flags.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    url = f"{'https' if flags.tls_cert else 'http'}://{flags.host}:{flags.port}"
    server = ConfigServer(Path(flags.record), url, os.environ.get(ENV, ""), flags.planner,
                          Objectives(ttft_s=flags.ttft_objective, tpot_s=flags.tpot_objective))
    config = uvicorn.Config(server.app(), host=flags.host, port=flags.port, log_config=None, log_level=flags.log_level, server_header=False,
                            access_log=False, lifespan="on", ssl_certfile=flags.tls_cert or None, ssl_keyfile=flags.tls_key or None)
    try:
        uvicorn.Server(config).run()
    except TokenmillError as error:
        print(f"config server: {error}", file=sys.stderr)
        return 1
    except SystemExit as ended:   # uvicorn says what was wrong, and exits with 3 when it could not start
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
