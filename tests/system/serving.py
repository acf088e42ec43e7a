"""`tokenmill serve` processes for tests, started as a user starts them; ended, with the keeper of their queue, whatever happens."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from coordinator import kept_queue
from coordinator.queue_record import FILE, read_record
from tests.system.farm import ROOT

SCRIPTS = ROOT / "deploy/start_scripts"
READY_S = 120.0
STOP_S = 60.0


class Serving:
    """One `tokenmill serve …` (or any command), its output in a file."""

    def __init__(self, name: str, folder: Path, command: list[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._command, self._environment = command, environment
        self.start()

    def start(self) -> None:
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
                                                                         **self._environment})

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_said(self, pattern: str, times: int = 1) -> None:
        give_up_at = time.monotonic() + READY_S
        while len(re.findall(pattern, self.log)) < times:
            assert self.process.poll() is None and time.monotonic() < give_up_at, f"{self.name}: {self.log[-3000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to what the user started; its children notice by themselves."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """SIGKILL to it and to all that it started."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Servings:
    """All that a test started. A context manager."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = dict(environment or {})
        self.all: list[Serving] = []

    def __enter__(self) -> "Servings":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for record_path in self.folder.rglob(FILE):      # of doors that were killed
            if (record := read_record(record_path)) is not None:
                kept_queue.stop(record.pid, record_path.parent)

    def serve(self, name: str, *flags: str, environment: Mapping[str, str] | None = None) -> Serving:
        state = [] if any(flag.startswith("--state_dir") for flag in flags) else ["--state_dir", str(self.folder / f"state-{name}")]
        return self.run(name, [sys.executable, "-m", "tokenmill", "serve", *flags, *state], environment)

    def script(self, name: str, path: str, *args: str, flags: str = "", environment: Mapping[str, str] | None = None) -> Serving:
        """One of the start scripts, as its first lines say; `flags` are added."""
        added = f"--state_dir {self.folder / f'state-{name}'} {flags}"
        return self.run(name, ["sh", str(SCRIPTS / path), *args], {"TOKENMILL_FLAGS": added, **(environment or {})})

    def run(self, name: str, command: list[str], environment: Mapping[str, str] | None = None) -> Serving:
        self.all.append(Serving(name, self.folder, command, {**self.environment, **(environment or {})}))
        return self.all[-1]

    def stop(self) -> None:
        """SIGTERM to all, the youngest first; each must end with 0."""
        running = [serving for serving in self.all if serving.process.poll() is None]
        for serving in reversed(running):
            serving.process.send_signal(signal.SIGTERM)
        for serving in reversed(running):
            try:
                status = serving.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(serving.process.pid, signal.SIGKILL)
                raise AssertionError(f"{serving.name} did not stop:\n{serving.log[-3000:]}") from None
            assert status == 0, f"{serving.name} ended with {status}:\n{serving.log[-3000:]}"

    def wait_ready(self, url: str) -> None:
        """Until a master can have requests answered."""
        give_up_at = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/readiness", timeout=3.0).status_code == 200:
                    return
            assert time.monotonic() < give_up_at, "\n".join(f"--- {s.name}\n{s.log[-2000:]}" for s in self.all)
            time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
