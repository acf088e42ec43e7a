"""A farm of real processes for tests: one pd_master, any workers, each of which can be killed, stopped and started again."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from coordinator import lifeline
from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.farm_access import FarmAccess
from coordinator.status import collect
from coordinator.store import Store
from coordinator.subjects import model_token

ROOT = Path(__file__).resolve().parents[2]
READY_S = 90.0
STOP_S = 20.0
MODEL = "tiny"


class Process:
    """One `python -m module args` whose output goes to a file."""

    def __init__(self, name: str, module: str, args: Sequence[str], log_dir: Path) -> None:
        self.name = name
        self.log_path = log_dir / f"{name}.log"
        self._module = module
        self._args = args
        self._lifeline = -1
        self.start()

    def start(self) -> None:
        """The process ends with the test run, however that ends."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_path.open("ab") as log:
            self.process, self._lifeline = lifeline.spawn(self._module, self._args, output=log, environment=environment)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """To the process alone: what it started must notice by itself."""
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM; the exit status. A process that does not end in time is killed, and that is an error."""
        if self.is_running:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not stop in {timeout_s:g} s:\n{self.log[-3000:]}") from None


class Farm:
    """Servers of its own, one or more REST shims, workers by role. A context manager; nothing is left behind."""

    def __init__(self, folder: Path, model_dir: Path, model: str = MODEL, lease_s: float = 5.0) -> None:
        self.folder = folder
        self.model_dir = model_dir
        self.model = model
        self.lease_s = lease_s
        self.services = EmbeddedServices(folder / "state")
        self.processes: dict[str, Process] = {}
        self._stack = contextlib.ExitStack()
        self._ports: dict[str, int] = {}

    def __enter__(self) -> "Farm":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(self.services)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.is_running:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
        for process in self.processes.values():
            with contextlib.suppress(AssertionError):
                process.stop()
        self._stack.close()

    def rest(self, name: str = "rest", *flags: str, model: str = "", wait: bool = True) -> str:
        """Start a shim; its URL."""
        port = self._ports.setdefault(name, _free_port())
        args = [*self._common(model), "--host", "127.0.0.1", "--port", str(port), *flags]
        self.processes[name] = Process(name, "producers.rest", args, self.folder)
        if wait:
            self.wait_for(f"{self.url(name)}/liveness", name)
        return self.url(name)

    def worker(self, role: str, name: str = "", *flags: str, model: str = "") -> Process:
        name = name or role
        args = [*self._common(model), "--role", role, "--worker_id", name, "--num_threads", "1", "--max_total_token_num", "16384",
                "--lease_s", str(self.lease_s), *flags]
        process = self.processes[name] = Process(name, "workers.worker", args, self.folder)
        return process

    def url(self, name: str = "rest") -> str:
        return f"http://127.0.0.1:{self._ports[name]}"

    def wait_ready(self, name: str = "rest") -> None:
        self.wait_for(f"{self.url(name)}/readiness", name)

    def wait_for(self, url: str, name: str) -> None:
        """Until it answers 200; fails with the logs when a process ends or time is over."""
        give_up_at = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=2.0).status_code == 200:
                    return
            dead = [p.name for p in self.processes.values() if not p.is_running]
            assert not dead and time.monotonic() < give_up_at, f"{name}: {url} not ready, ended: {dead}\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.log[-2500:]}" for p in self.processes.values())

    async def status(self, model: str = "") -> dict[str, Any]:
        store = Store(self.services.redis_url)
        try:
            async with await Bus.connect(self.services.nats_url, "status") as bus:
                return await collect(FarmAccess(bus, store, model_token(model or self.model)))
        finally:
            await store.close()

    async def wait_at_rest(self, timeout_s: float = 30.0, model: str = "") -> dict[str, Any]:
        """Until nothing is held anywhere: pages, pins, claims, unacknowledged messages, jobs. Fails with what still is."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            status = await self.status(model)
            held = {name: status[name] for name in ("held_pages", "pinned", "running", "waiting", "claims", "num_ack_pending", "jobs_depth",
                                                    "handoff_depth")}
            if not any(held.values()):
                return status
            assert time.monotonic() < give_up_at, f"still held: {held}\n{status}\n{self.logs()}"

    async def wait_registered(self, *names: str) -> None:
        """Until these workers hold a lease."""
        store = Store(self.services.redis_url)
        give_up_at = time.monotonic() + READY_S
        try:
            while not set(names) <= {view.worker for view in await store.workers() if view.is_alive}:
                assert time.monotonic() < give_up_at, f"{names} not registered\n{self.logs()}"
        finally:
            await store.close()

    def _common(self, model: str) -> list[str]:
        return ["--nats_url", self.services.nats_url, "--redis_url", self.services.redis_url, "--model_dir", str(self.model_dir),
                "--model_name", model or self.model, "--max_req_total_len", "2048", "--log_level", "info"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
