"""A farm on one GPU in either of its shapes, started as a user starts it and gone when the block ends. A prefill worker can be killed."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.farm_process import LOG_LINES, ROOT, FarmFailed, running_farm
from bench.http_stream import Target

POLL_S = 0.2
STOP_S = 45.0


@dataclass(frozen=True, slots=True)
class GpuFarm:
    """`replace_prefill` kills the prefill worker with SIGKILL, all its processes, and starts another. Not in mode normal."""

    url: str
    replace_prefill: Callable[[], None] | None = None


@contextlib.contextmanager
def running_modes(mode: str, model_dir: Path, state_dir: Path, arguments: argparse.Namespace) -> Iterator[GpuFarm]:
    """A farm that answers. `mode` is normal or pd. Raises FarmFailed with the last words of what did not start."""
    flags = ["--device", arguments.device, "--max_total_token_num", str(arguments.pool_tokens), *shlex.split(arguments.serve_flags)]
    os.environ["LOADWORKER"] = str(arguments.load_workers)
    with _multi_process_service() if arguments.mps else contextlib.nullcontext():
        if mode == "normal":
            with running_farm(model_dir, state_dir, num_threads=0, ready_s=arguments.ready_s, flags=flags) as url:
                yield GpuFarm(url)
            return
        with running_farm(model_dir, state_dir, num_threads=0, ready_s=arguments.ready_s, flags=["--run_mode", "pd_master"]) as url:
            target = Target.parse(url)
            join = ["--pd_master_ip", target.host, "--pd_master_port", str(target.port), *flags]
            with contextlib.ExitStack() as stack:
                prefill, decode = (stack.enter_context(_worker(role, model_dir, state_dir, join)) for role in ("prefill", "decode"))

                def replace_prefill() -> None:
                    os.killpg(prefill.pid, signal.SIGKILL)
                    prefill.wait()
                    stack.enter_context(_worker("prefill", model_dir, state_dir, join))

                _wait_until_ready(url, {"prefill": prefill, "decode": decode}, state_dir, arguments.ready_s)
                yield GpuFarm(url, replace_prefill)


@contextlib.contextmanager
def _worker(role: str, model_dir: Path, state_dir: Path, flags: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tokenmill", "serve", "--run_mode", role, "--model_dir", str(model_dir.resolve()), *flags]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # a clone need not be installed
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": search}
    with _log(state_dir, role).open("ab") as log:
        process = subprocess.Popen(command, cwd=state_dir, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, workers: dict[str, subprocess.Popen[bytes]], state_dir: Path, ready_s: float) -> None:
    deadline = time.monotonic() + ready_s
    while not _answers(f"{url}/readiness"):
        for role, process in workers.items():
            if process.poll() is not None or time.monotonic() > deadline:
                last = "\n  ".join(_log(state_dir, role).read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise FarmFailed(f"the {role} worker is not ready (status {process.poll()}); its last words:\n  {last}")
        time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _log(state_dir: Path, role: str) -> Path:
    return state_dir / f"{role}.log"


@contextlib.contextmanager
def _multi_process_service() -> Iterator[None]:
    subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
    try:
        yield
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", check=False)
