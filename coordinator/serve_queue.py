"""Where the processes of one `tokenmill serve` find their queue: given, asked for, or started here. One decision per run mode.

    normal          servers of its own, which end with it; of several nodes node 0 keeps them as a config server does, the others ask it
    config_server   servers of its own in the care of a keeper that outlives it, those of another config server (--join), or given URLs
    pd_master       asks the config servers; without any it keeps a queue as a config server does
    prefill,decode  ask the config servers or the pd_master
"""

import argparse
import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator import bootstrap, queue_users, serve_ranks
from coordinator.bootstrap import Doors
from coordinator.embedded import EmbeddedServices
from coordinator.kept_queue import KeptQueue
from coordinator.queue_record import FILE, QueueRecord, QueueUrls, read_record

PD_MASTER_PORTS = (1212, 60011, 8000)    # LightLLM's default, the guide's, ours: tried in turn when --pd_master_port is not given
KEEPER_FLAGS = ("nats_port", "redis_port", "nats_monitor_port", "tls_cert", "tls_key")
JOINED_FILE = "joined.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmQueue:
    """`urls` are for this process' role. `record_path` is what a door hands out to others; None where this is no door.

    `watch` is called now and then, and brings back what died.
    """

    urls: QueueUrls
    record_path: Path | None = None
    watch: Callable[[], object] = lambda: None

    @property
    def urls_for_workers(self) -> QueueUrls:
        """What other nodes of this worker get."""
        record = read_record(self.record_path) if self.record_path is not None else None
        return self.urls if record is None else record.urls("worker")


def find_queue(flags: argparse.Namespace, state_dir: Path, stack: contextlib.ExitStack) -> FarmQueue:
    """Raises ConfigError. Waits for doors that are asked, for ever."""
    if flags.run_mode == "config_server":
        return _of_config_server(flags, state_dir, stack)
    if flags.nats_url:
        return FarmQueue(urls=QueueUrls(nats_url=flags.nats_url, redis_url=flags.redis_url))
    if serve_ranks.is_other_node(flags):
        return FarmQueue(urls=serve_ranks.ask_node_0(flags))
    role = queue_users.ROLE_OF_MODE[flags.run_mode]
    if flags.config_server_host or flags.run_mode in ("prefill", "decode"):
        return FarmQueue(urls=bootstrap.wait_for_queue(doors(flags), role))
    if flags.run_mode == "pd_master":
        return _kept(flags, flags.host, state_dir, role, stack)
    if flags.nnodes > 1:
        return _kept(flags, flags.nccl_host or "127.0.0.1", state_dir, role, stack)
    return _embedded(flags, state_dir, stack)


def doors(flags: argparse.Namespace) -> Doors:
    """Where this process asks for its queue."""
    if flags.config_server_host:
        found, said = bootstrap.addresses(flags.config_server_host, (flags.config_server_port,)), "a config server (--config_server_host)"
    elif flags.pd_master_port:
        found, said = bootstrap.addresses(flags.pd_master_ip, (flags.pd_master_port,)), "a pd_master (--pd_master_ip, --pd_master_port)"
    else:
        found = bootstrap.addresses(flags.pd_master_ip, PD_MASTER_PORTS)
        said = f"a pd_master (--pd_master_port is not given: tried {', '.join(map(str, PD_MASTER_PORTS))})"
    return Doors(addresses=found, flags=said, token=flags.cluster_token, api_key=flags.api_key, tls_ca=flags.tls_ca)


def _of_config_server(flags: argparse.Namespace, state_dir: Path, stack: contextlib.ExitStack) -> FarmQueue:
    if not flags.nats_url and not flags.join:
        return _kept(flags, flags.config_server_host, state_dir, "master", stack)
    if flags.join:
        asked = Doors(addresses=bootstrap.addresses(flags.join, (flags.config_server_port,)), flags="another config server (--join)",
                      token=flags.cluster_token, tls_ca=flags.tls_ca)
        record = QueueRecord.from_map(bootstrap.wait_for_record(asked))
    else:
        record = QueueRecord(given={"nats_url": flags.nats_url, "redis_url": flags.redis_url})
    record.write(state_dir / JOINED_FILE)
    return FarmQueue(urls=record.urls("master"), record_path=state_dir / JOINED_FILE)


def _kept(flags: argparse.Namespace, host: str, state_dir: Path, role: str, stack: contextlib.ExitStack) -> FarmQueue:
    kept = KeptQueue(state_dir, host, flags.cluster_token, {name: getattr(flags, name) for name in KEEPER_FLAGS})
    kept.start()
    stack.callback(kept.stop)
    if kept.was_adopted:
        print(f"the queue of {state_dir} is running (keeper {kept.record.pid}): adopted", file=sys.stderr, flush=True)
    return FarmQueue(urls=kept.record.urls(role), record_path=state_dir / FILE, watch=kept.restart_if_dead)


def _embedded(flags: argparse.Namespace, state_dir: Path, stack: contextlib.ExitStack) -> FarmQueue:
    def restart(name: str, status: int) -> None:
        print(f"{name} ended with status {status}: started again", file=sys.stderr, flush=True)
        services.server(name).bring_back(stopping)

    stopping = threading.Event()
    services = EmbeddedServices(state_dir, flags.nats_port, flags.redis_port, on_exit=restart)
    stack.enter_context(services)
    stack.callback(stopping.set)
    return FarmQueue(urls=QueueUrls(nats_url=services.nats_url, redis_url=services.redis_url))
