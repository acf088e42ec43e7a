"""`tokenmill serve` as a test drives it: its URL, the processes of its ranks, and its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"(?:tokenmill|pd_master) ready: (http://[^\s]+)")
READY_S = 150.0
PREFIX: Sequence[str] = ()


class Served:
    """A context manager; leaving it stops the farm, which must end in order. `prefix`: a command that the farm is started by; `script`: one
    of deploy/start_scripts and its arguments, instead of `tokenmill serve`."""

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = PREFIX,
                 script: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log_path = folder / "serve.log"
        self._argv = [*prefix, sys.executable, "-m", "tokenmill", "serve", "--device", "cpu", "--num_threads", "1", "--log_level", "info",
                      *flags]
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **(environment or {})}
        if script:
            self._argv = [*prefix, "sh", str(ROOT / "deploy" / "start_scripts" / script[0]), *script[1:]]
            self._environment |= {"TOKENMILL": f"{sys.executable} -m tokenmill", "TOKENMILL_FLAGS": " ".join(flags)}
        self.start()

    def start(self) -> None:
        with self.log_path.open("ab") as out:
            self.process = subprocess.Popen(self._argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) in (0, -signal.SIGKILL), self.log
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"serve did not stop:\n{self.log}") from None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def url(self) -> str:
        """Once it is ready."""
        give_up_at = time.monotonic() + READY_S
        while not (found := READY.search(self.log)):
            assert self.process.poll() is None and time.monotonic() < give_up_at, self.log
            time.sleep(0.05)
        return found[1]

    def wait_said(self, what: str, times: int = 1) -> None:
        give_up_at = time.monotonic() + READY_S
        while self.log.count(what) < times:
            assert self.process.poll() is None and time.monotonic() < give_up_at, self.log
            time.sleep(0.05)

    def rank(self, rank: int) -> psutil.Process:
        """The process that computes as this rank: a follower, or a leader's engine. Waits for it to be there."""
        give_up_at = time.monotonic() + READY_S
        while time.monotonic() < give_up_at:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    argv = process.cmdline()
                except psutil.Error:
                    continue
                if "workers.follower" in argv and argv[argv.index("--rank") + 1] == str(rank):
                    return process
                if "workers.engine" in argv and f'"rank": {rank},' in argv[-1]:
                    return process
            time.sleep(0.05)
        raise AssertionError(f"no rank {rank}:\n{self.log}")

    def wait_ready(self) -> None:
        give_up_at = time.monotonic() + READY_S
        while httpx.get(f"{self.url()}/readiness", timeout=5).status_code != 200:
            assert time.monotonic() < give_up_at, self.log
            time.sleep(0.1)

    def status(self) -> dict[str, object]:
        ran = subprocess.run([sys.executable, "-m", "tokenmill", "status", "--url", self.url(), "--json"], cwd=ROOT, capture_output=True,
                             text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        report: dict[str, object] = json.loads(ran.stdout)
        return report

    def wait_at_rest(self) -> dict[str, object]:
        """Until nothing is held: pages, claims, messages."""
        give_up_at = time.monotonic() + 30
        while True:
            status = self.status()
            held = {name: status[name] for name in ("held_pages", "running", "waiting", "claims", "num_ack_pending", "jobs_depth")}
            if not any(held.values()):
                return status
            assert time.monotonic() < give_up_at, f"still held: {held}\n{self.log}"
