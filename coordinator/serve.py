"""`tokenmill serve`: start the processes of one run mode, say when they are ready, restart what dies, end all of it together."""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

from coordinator import lifeline, serve_flags
from coordinator.embedded import EmbeddedServices
from coordinator.errors import ConfigError, TokenmillError
from coordinator.farm_access import with_key

POLL_S = 0.1
MAX_FAST_DEATHS = 3          # a child that dies this often within FAST_S each is a fault that a restart does not heal
FAST_S = 20.0
STOP_GRACE_S = 10.0


class Child:
    """One supervised process: started on a lifeline, restarted when it dies."""

    def __init__(self, name: str, module: str, args: list[str]) -> None:
        self.name = name
        self._module = module
        self._args = args
        self._deaths: list[float] = []
        self.start()

    def start(self) -> None:
        self.process, self._lifeline = lifeline.spawn(self._module, self._args)

    def restart_if_dead(self) -> None:
        """Raises TokenmillError when it keeps dying."""
        status = self.process.poll()
        if status is None:
            return
        os.close(self._lifeline)
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < FAST_S] + [now]
        if len(self._deaths) >= MAX_FAST_DEATHS or status == 2:
            self._lifeline = -1
            raise TokenmillError(f"{self.name} ended with status {status}")
        print(f"{self.name} ended with status {status}: started again", file=sys.stderr, flush=True)
        self.start()

    def terminate(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


class Stop(Exception):
    """SIGINT or SIGTERM asked us to end."""


def main(argv: list[str]) -> int:
    try:
        flags = serve_flags.parse(argv)
        return serve(flags)
    except ConfigError as error:
        print(f"tokenmill serve: {error}", file=sys.stderr)
        return 2
    except TokenmillError as error:
        print(f"tokenmill serve: {error}", file=sys.stderr)
        return 1


def serve(flags: argparse.Namespace) -> int:
    """Run until a signal; 0 when all children ended in order."""
    lifeline.hold_on()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stop)
    with contextlib.ExitStack() as stack:
        try:
            nats_url, redis_url = _servers(flags, stack)
            port = _rest_port(flags)
            children = _start_children(flags, nats_url, redis_url, port, stack)
            _announce(flags, children, port)
            while True:
                for child in children:
                    child.restart_if_dead()
                time.sleep(POLL_S)
        except Stop:
            print(f"stopping: what runs may finish for {flags.drain_timeout:g} s; once more ends it at once (unfinished jobs stay in the "
                  "queue)", file=sys.stderr, flush=True)
    return 0


def _raise_stop(number: int, frame: FrameType | None) -> None:
    raise Stop


def _servers(flags: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[str, str]:
    """URLs of NATS and Redis: given, asked from the pd_master, or started here."""
    if flags.nats_url:
        return flags.nats_url, flags.redis_url
    if flags.run_mode in ("prefill", "decode"):
        return _ask_master(flags.pd_master_ip, flags.pd_master_port)
    state_dir = _state_dir(flags)

    def restart(name: str, status: int) -> None:
        print(f"{name} ended with status {status}: started again", file=sys.stderr, flush=True)
        (services.nats if name == services.nats.name else services.redis).start()

    services = EmbeddedServices(state_dir, flags.nats_port, flags.redis_port, on_exit=restart)
    stack.enter_context(services)
    return services.nats_url, services.redis_url


def _state_dir(flags: argparse.Namespace) -> Path:
    return Path(flags.state_dir or f"state/{flags.run_mode}-{flags.port}")


def _ask_master(host: str, port: int) -> tuple[str, str]:
    """Wait for the pd_master and ask where the queue is. Raises Stop on a signal meanwhile."""
    url = f"http://{host}:{port}/bootstrap"
    told = False
    while True:
        try:
            with urllib.request.urlopen(with_key(url), timeout=2.0) as reply:
                body: dict[str, Any] = json.load(reply)
                return body["nats_url"], body["redis_url"]
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise ConfigError(f"{url} wants a trusted API key: set TOKENMILL_API_KEY (tokenmill keys create --trusted)") from None
            raise ConfigError(f"{url} answered {error.code}: --pd_master_ip and --pd_master_port must name a tokenmill pd_master") from None
        except (OSError, ValueError, KeyError) as error:
            if not told:
                print(f"waiting for a pd_master at {url} ({error}); its address is given by --pd_master_ip and --pd_master_port",
                      file=sys.stderr, flush=True)
                told = True
            time.sleep(0.5)


def _rest_port(flags: argparse.Namespace) -> int:
    """A port for the REST shim; taken is an error before anything heavy starts."""
    if flags.run_mode not in ("normal", "pd_master"):
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((flags.host, flags.port))
        except OSError as error:
            raise ConfigError(f"--host {flags.host} --port {flags.port}: {error.strerror}") from None
        bound: int = probe.getsockname()[1]
        return bound


def _start_children(flags: argparse.Namespace, nats_url: str, redis_url: str, port: int, stack: contextlib.ExitStack) -> list[Child]:
    children: list[Child] = []

    def stop_all() -> None:
        deadline = time.monotonic() + flags.drain_timeout + STOP_GRACE_S
        try:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(deadline)
        except Stop:
            deadline = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for child in children:
            child.wait(deadline)

    stack.callback(stop_all)
    common = ["--nats_url", nats_url, "--redis_url", redis_url, "--model_dir", flags.model_dir, "--model_name", flags.model_name,
              "--max_req_total_len", str(flags.max_req_total_len), "--max_queued", str(flags.max_queued), "--prefix_affinity",
              flags.prefix_affinity, "--disagg_min_tokens", str(flags.disagg_min_tokens), "--log_level", flags.log_level]
    if flags.run_mode in ("normal", "pd_master"):
        children.append(Child("REST shim", "producers.rest", [
            *common, "--host", flags.host, "--port", str(port), "--max_body_bytes", str(flags.max_body_bytes),
            "--max_queued_tokens", str(flags.max_queued_tokens), "--max_tenant_jobs", str(flags.max_tenant_jobs),
            "--max_tenant_tokens", str(flags.max_tenant_tokens), "--api_keys_file", flags.api_keys_file,
            "--files_dir", flags.files_dir or str(_state_dir(flags) / "files"),
            "--cors_origins", flags.cors_origins, *(["--insecure"] if flags.insecure else [])]))
    if flags.run_mode in ("normal", "prefill", "decode"):
        role = "both" if flags.run_mode == "normal" else flags.run_mode
        children.append(Child(f"{role} worker", "workers.worker", [*common, *_worker_args(flags, role)]))
    return children


def _worker_args(flags: argparse.Namespace, role: str) -> list[str]:
    args = ["--role", role, "--drain_timeout", str(flags.drain_timeout), "--load_workers", str(flags.load_workers)]
    for name in ("device", "data_type", "max_total_token_num", "mem_fraction", "running_max_req_size", "chunked_prefill_size", "page_size",
                 "num_threads", "graph_max_batch_size", "engine_stall_s", "worker_id", "engine", "mock_costs"):
        if (value := getattr(flags, name)) != "":
            args += [f"--{name}", str(value)]
    return args + [f"--{name}" for name in ("disable_dynamic_prompt_cache", "disable_cudagraph", "enable_fa3") if getattr(flags, name)]


def _announce(flags: argparse.Namespace, children: list[Child], port: int) -> None:
    """Wait until requests are answered, then say so, with a line to paste."""
    if flags.run_mode in ("prefill", "decode"):
        return  # the worker says itself when it is ready
    url = f"http://{flags.host}:{port}"
    path = "/readiness" if flags.run_mode == "normal" else "/liveness"
    while not _answers(url + path):
        for child in children:
            child.restart_if_dead()
        time.sleep(POLL_S)
    if flags.run_mode == "pd_master":
        print(f"\npd_master ready: {url}\nworkers join with  --pd_master_ip {flags.host} --pd_master_port {port}\n", flush=True)
        return
    print(f"\ntokenmill ready: {url}\n\n  curl {url}/generate -H 'Content-Type: application/json' \\\n"
          "       -d '{\"inputs\": \"What is AI?\", \"parameters\": {\"max_new_tokens\": 17, \"frequency_penalty\": 1}}'\n\n"
          "Ctrl-C stops everything.\n", flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
