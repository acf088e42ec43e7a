"""A farm started as a user starts it (`tokenmill serve`), for as long as a measurement takes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

READY = re.compile(rb"ready[^\n]*?(https?://[^\s/]+)")
POLL_S = 0.05
STOP_S = 45.0
LOG_LINES = 20  # of the farm's last words in an error
ROOT = Path(__file__).resolve().parent.parent


class FarmFailed(Exception):
    """The farm did not become ready; the text has its last words."""


@contextlib.contextmanager
def running_farm(model_dir: Path, state_dir: Path, *, num_threads: int, ready_s: float = 300.0, flags: Sequence[str] = ()) -> Iterator[str]:
    """Base URL of a farm that is ready; it is stopped (and has left no process) when the block ends."""
    state_dir.mkdir(parents=True, exist_ok=True)
    log_path = state_dir / "farm.log"
    command = [
        sys.executable, "-m", "tokenmill", "serve", "--model_dir", str(model_dir.resolve()), "--port", "0",
        "--state_dir", str(state_dir / "data"), *(["--num_threads", str(num_threads)] if num_threads else []), *flags,
    ]  # fmt: skip
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # a clone need not be installed
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": search}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=state_dir, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _wait_until_ready(process, log_path, ready_s)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], log_path: Path, ready_s: float) -> str:
    deadline = time.monotonic() + ready_s
    while True:
        written = log_path.read_bytes()
        if found := READY.search(written):
            return found[1].decode()
        is_over = process.poll() is not None
        if is_over or time.monotonic() > deadline:
            why = f"ended with status {process.returncode}" if is_over else f"was not ready after {ready_s:g} s"
            last = "\n  ".join(written.decode(errors="replace").splitlines()[-LOG_LINES:])
            raise FarmFailed(f"the farm {why}; its last words:\n  {last}")
        time.sleep(POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    if process.poll() is None:
        process.kill()
        process.wait()
