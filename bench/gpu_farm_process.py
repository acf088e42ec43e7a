"""A farm on GPUs in any of its shapes, started as a user starts it and gone when the block ends. Its workers can be killed."""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from bench.farm_process import LOG_LINES, ROOT, FarmFailed, running_farm
from bench.http_stream import Target
from bench.mps import multi_process_service

POLL_S = 0.2
STOP_S = 45.0
MASTERS = "masters"      # a file with the URLs of all of them


@contextlib.contextmanager
def running_modes(mode: str, model_dir: Path, state_dir: Path, arguments: argparse.Namespace) -> Iterator[str]:
    """URL of a farm that answers. `mode` is normal, pd or pair. Raises FarmFailed with the last words of what did not start."""
    flags = ["--max_total_token_num", str(arguments.pool_tokens), *shlex.split(arguments.serve_flags)]
    first, second = arguments.devices or (arguments.device, arguments.device)
    os.environ["LOADWORKER"] = str(arguments.load_workers)
    with multi_process_service() if arguments.mps else contextlib.nullcontext(True) as is_up:
        if not is_up:
            raise FarmFailed("--mps: nvidia-cuda-mps-control is not there, or does not start")
        if mode == "normal":
            with running_farm(model_dir, state_dir, num_threads=0, ready_s=arguments.ready_s,
                              flags=["--device", arguments.device, *flags]) as url:
                yield url
            return
        with running_farm(model_dir, state_dir, num_threads=0, ready_s=arguments.ready_s, flags=["--run_mode", "pd_master"]) as url:
            target = Target.parse(url)
            join = ["--pd_master_ip", target.host, "--pd_master_port", str(target.port), *flags]
            if mode == "pd":
                commands = _disaggregated(arguments, join, first, second)
            else:
                common = ["--role", "both", *_bootstrap(url), *flags, "--load_workers", str(arguments.load_workers)]
                commands = {name: (["workers.worker", *common, "--worker_id", name, "--device", device], {})
                            for name, device in (("both-1", first), ("both-2", second))}
            (state_dir / MASTERS).write_text(url)
            with contextlib.ExitStack() as stack:
                for number in range(2, arguments.masters + 1):
                    stack.enter_context(_further_master(number, url, model_dir, state_dir, arguments))
                workers = {name: stack.enter_context(_worker(name, model_dir, state_dir, *command)) for name, command in commands.items()}
                _wait_until_ready(url, workers, state_dir, arguments.ready_s)
                yield url


Command = tuple[list[str], dict[str, str]]   # module and arguments, and what is set in the environment


def _disaggregated(arguments: argparse.Namespace, join: list[str], first: str, second: str) -> dict[str, Command]:
    """Every worker sees all GPUs, its own first: memory is mapped between GPUs that both sides see."""
    if not arguments.workers:
        return {role: (["tokenmill", "serve", "--run_mode", role, *join, "--device", device], {})
                for role, device in (("prefill", first), ("decode", second))}
    specs = [(role, gpus.split(",")) for role, _, gpus in (spec.partition("=") for spec in arguments.workers)]
    every = [gpu for _, gpus in specs for gpu in gpus]
    return {f"{role}-{number}": (["tokenmill", "serve", "--run_mode", role, *join, "--device", arguments.device, "--tp", str(len(gpus))],
                                 {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys([*gpus, *every]))} if arguments.device != "cpu" else {})
            for number, (role, gpus) in enumerate(specs, 1)}


@contextlib.contextmanager
def _further_master(number: int, url: str, model_dir: Path, state_dir: Path, arguments: argparse.Namespace) -> Iterator[None]:
    """Another REST door to the queue of the master at `url`."""
    with running_farm(model_dir, state_dir / f"master-{number}", num_threads=0, ready_s=arguments.ready_s,
                      flags=["--run_mode", "pd_master", *_bootstrap(url)]) as further:
        with (state_dir / MASTERS).open("a") as file:
            file.write(f"\n{further}")
        yield


def master_urls(state_dir: Path) -> list[str]:
    return (state_dir / MASTERS).read_text().split()


def worker_names(state_dir: Path) -> list[str]:
    return sorted(path.stem for path in state_dir.glob("*.pid"))


def kill_worker(state_dir: Path, role: str) -> None:
    """SIGKILL to all that `tokenmill serve` runs for this worker: its I/O process, whose engine goes with it, and other ranks. They are
    started again."""
    parent = int(_pid(state_dir, role).read_text())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" ")
            if int(rest.rpartition(")")[2].split()[1]) == parent:
                print(f"  SIGKILL to the {role} worker, process {pid}", flush=True)
                os.kill(int(pid), signal.SIGKILL)


def _bootstrap(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/bootstrap", timeout=10.0) as reply:
        told = json.load(reply)
    return ["--nats_url", told["nats_url"], "--redis_url", told["redis_url"]]


@contextlib.contextmanager
def _worker(role: str, model_dir: Path, state_dir: Path, what: list[str], variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", *what, "--model_dir", str(model_dir.resolve())]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # a clone need not be installed
    environment = {**os.environ, **variables, "PYTHONUNBUFFERED": "1", "PYTHONPATH": search}
    with _log(state_dir, role).open("wb") as log:
        process = subprocess.Popen(command, cwd=state_dir, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    _pid(state_dir, role).write_text(str(process.pid))
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


def _pid(state_dir: Path, role: str) -> Path:
    return state_dir / f"{role}.pid"
