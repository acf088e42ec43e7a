"""`tokenmill serve`: start the processes of one run mode, say when they are ready, restart what dies, end all of it together."""

import argparse
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import FrameType

from coordinator import cluster_token, lifeline, serve_flags, serve_ranks, tls
from coordinator.errors import ConfigError, TokenmillError
from coordinator.process_state import StoppedFor
from coordinator.rendezvous import PEER_STATUS, SILENCE_S
from coordinator.serve_queue import FarmQueue, find_queue

POLL_S = 0.1
MAX_FAST_DEATHS = 3          # a child that dies this often within FAST_S each is a fault that a restart does not heal
FAST_S = 20.0
STOP_GRACE_S = 10.0


class Child:
    """One supervised process: started on a lifeline, restarted when it dies."""

    def __init__(self, name: str, module: str, args: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self._module = module
        self._args = args
        self._environment = environment
        self._deaths: list[float] = []
        self._stopped = StoppedFor()
        self.is_worker = module == "workers.worker"
        self.has_left = False
        self.start()

    def start(self) -> None:
        self.process, self._lifeline = lifeline.spawn(self._module, self._args, environment=self._environment)

    def restart_if_dead(self) -> None:
        """Raises TokenmillError when it keeps dying."""
        status = self.process.poll()
        if self.has_left:
            return
        if status is None:
            if self._module == serve_ranks.FOLLOWER and self._stopped.seconds(self.process.pid) > SILENCE_S:
                self.process.kill()  # its group is broken for its silence, and cannot form again while it is there
            return
        os.close(self._lifeline)
        if status in PEER_STATUS.values():  # its group broke, since another rank ended: that one's supervisor counts
            self.start()
            return
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < FAST_S] + [now]
        if status == lifeline.DRAINED_STATUS:
            self._lifeline = -1
            self.has_left = True
            print(f"{self.name} was drained and has left", file=sys.stderr, flush=True)
            return
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
            port = _rest_port(flags)
            queue = find_queue(flags, _state_dir(flags), stack)
            desk = serve_ranks.open_desk(flags, queue.urls_for_workers, stack)
            children = _start_children(flags, queue, port, desk, stack)
            _announce(flags, children, port)
            while True:
                queue.watch()
                for child in children:
                    child.restart_if_dead()
                if (workers := [child for child in children if child.is_worker]) and all(child.has_left for child in workers):
                    break    # drained, all of them: what else there is here has nobody to work for
                time.sleep(POLL_S)
        except Stop:
            print(f"stopping: what runs may finish for {flags.drain_timeout:g} s; once more ends it at once (unfinished jobs stay in the "
                  "queue)", file=sys.stderr, flush=True)
    return 0


def _raise_stop(number: int, frame: FrameType | None) -> None:
    raise Stop


def _state_dir(flags: argparse.Namespace) -> Path:
    port = flags.config_server_port if flags.run_mode == "config_server" else flags.port
    return Path(flags.state_dir or f"state/{flags.run_mode}-{port}")


def _rest_port(flags: argparse.Namespace) -> int:
    """A port for the REST shim or the config server; taken is an error before anything heavy starts."""
    if flags.run_mode not in ("normal", "pd_master", "config_server") or serve_ranks.is_other_node(flags):
        return 0
    prefix = "config_server_" if flags.run_mode == "config_server" else ""
    host, port = getattr(flags, f"{prefix}host"), getattr(flags, f"{prefix}port")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--{prefix}host {host} --{prefix}port {port}: {error.strerror}") from None
        bound: int = probe.getsockname()[1]
        return bound


def _start_children(flags: argparse.Namespace, queue: FarmQueue, port: int, desk: serve_ranks.Meeting,
                    stack: contextlib.ExitStack) -> list[Child]:
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
    # URLs may carry passwords, and the token is one: neither belongs into a command line that everybody on the machine can read.
    environment = {**os.environ, "TOKENMILL_NATS_URL": queue.urls.nats_url, "TOKENMILL_REDIS_URL": queue.urls.redis_url,
                   cluster_token.ENV: flags.cluster_token, tls.ENV: flags.tls_ca}
    planner = ["--planner", flags.planner, "--ttft_objective", str(flags.ttft_objective), "--tpot_objective", str(flags.tpot_objective)]
    record = ["--queue_record", str(queue.record_path)] if queue.record_path is not None else []
    if flags.run_mode == "config_server":
        children.append(Child("config server", "coordinator.config_server", [
            "--host", flags.config_server_host, "--port", str(port), "--record", str(queue.record_path), "--tls_cert", flags.tls_cert,
            "--tls_key", flags.tls_key, "--log_level", flags.log_level, *planner], environment))
        return children
    common = ["--model_dir", flags.model_dir, "--model_name", flags.model_name, "--max_req_total_len", str(flags.max_req_total_len),
              "--max_queued", str(flags.max_queued), "--prefix_affinity", flags.prefix_affinity, "--disagg_min_tokens",
              str(flags.disagg_min_tokens), "--log_level", flags.log_level]
    if port:
        children.append(Child("REST shim", "producers.rest", [
            *common, "--host", flags.host, "--port", str(port), "--max_body_bytes", str(flags.max_body_bytes),
            "--max_queued_tokens", str(flags.max_queued_tokens), "--max_tenant_jobs", str(flags.max_tenant_jobs),
            "--max_tenant_tokens", str(flags.max_tenant_tokens), "--api_keys_file", flags.api_keys_file,
            "--files_dir", flags.files_dir or str(_state_dir(flags) / "files"),
            "--cors_origins", flags.cors_origins, "--tls_cert", flags.tls_cert, "--tls_key", flags.tls_key, *record, *planner,
            *(["--insecure"] if flags.insecure else [])], environment))
    if flags.run_mode in ("normal", "prefill", "decode"):
        role = "both" if flags.run_mode == "normal" else flags.run_mode
        for name, module, args in serve_ranks.processes(flags, role, [*common, *_worker_args(flags, role)], desk.address):
            children.append(Child(name, module, args, {**environment, **desk.environment}))
    return children


def _worker_args(flags: argparse.Namespace, role: str) -> list[str]:
    args = ["--role", role, "--drain_timeout", str(flags.drain_timeout), "--load_workers", str(flags.load_workers)]
    for name in ("device", "data_type", "max_total_token_num", "mem_fraction", "running_max_req_size", "chunked_prefill_size", "page_size",
                 "num_threads", "graph_max_batch_size", "engine_stall_s", "worker_id", "kv_transfer", "kv_host", "engine", "mock_costs",
                 "handoff_same_host"):
        if (value := getattr(flags, name)) != "":
            args += [f"--{name}", str(value)]
    return args + [f"--{name}" for name in ("disable_dynamic_prompt_cache", "disable_cudagraph", "enable_fa3") if getattr(flags, name)]


def _announce(flags: argparse.Namespace, children: list[Child], port: int) -> None:
    """Wait until requests are answered, then say so, with a line to paste."""
    if not port:
        return  # the worker says itself when it is ready
    host = flags.config_server_host if flags.run_mode == "config_server" else flags.host
    url = f"{'https' if flags.tls_cert else 'http'}://{host}:{port}"
    path = "/liveness" if flags.run_mode == "pd_master" else "/readiness"
    while not _answers(url + path):
        for child in children:
            child.restart_if_dead()
        time.sleep(POLL_S)
    host = socket.gethostname() if host in ("0.0.0.0", "::") else host
    if flags.run_mode == "config_server":
        print(f"\nconfig_server ready: {url}\npd_master, prefill and decode join with  --config_server_host {host} "
              f"--config_server_port {port}\n", flush=True)
        return
    if flags.run_mode == "pd_master":
        joining = (f"--config_server_host {flags.config_server_host} --config_server_port {flags.config_server_port}"
                   if flags.config_server_host else f"--pd_master_ip {host} --pd_master_port {port}")
        print(f"\npd_master ready: {url}\nworkers join with  {joining}\n", flush=True)
        return
    print(f"\ntokenmill ready: {url}\n\n  curl {url}/generate -H 'Content-Type: application/json' \\\n"
          "       -d '{\"inputs\": \"What is AI?\", \"parameters\": {\"max_new_tokens\": 17, \"frequency_penalty\": 1}}'\n\n"
          "Ctrl-C stops everything.\n", flush=True)


def _answers(url: str) -> bool:
    try:
        # Our own door: what its certificate says is for others to check.
        with urllib.request.urlopen(url, timeout=2.0, context=ssl._create_unverified_context()) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
