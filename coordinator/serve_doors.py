"""Which flags about doors, queues and secrets go together, by run mode. What does not is refused, with what to change."""

import argparse
from pathlib import Path

from coordinator.cluster_token import is_loopback
from coordinator.errors import ConfigError


def check(flags: argparse.Namespace) -> None:
    """Raises ConfigError."""
    mode = flags.run_mode
    ways = [name for name, is_given in (("--config_server_host", flags.config_server_host and mode != "config_server"),
                                        ("--pd_master_ip", flags.pd_master_ip), ("--nats_url", flags.nats_url)) if is_given]
    if mode in ("prefill", "decode") and not ways and not flags.node_rank:  # other nodes are told by node 0
        raise ConfigError(f"--run_mode {mode} needs --pd_master_ip and --pd_master_port, or --config_server_host and --config_server_port, "
                          "or --nats_url and --redis_url")
    if len(ways) > 1:
        raise ConfigError(f"{' and '.join(ways)}: give one of them, they are different ways to the queue")
    if flags.pd_master_ip and mode not in ("prefill", "decode"):
        raise ConfigError(f"--pd_master_ip {flags.pd_master_ip}: is for --run_mode prefill and decode, this is {mode}")
    if flags.config_server_host and mode == "normal":
        raise ConfigError(f"--config_server_host {flags.config_server_host}: --run_mode normal has its queue in itself; a farm of many "
                          "processes has --run_mode pd_master, prefill and decode")
    if flags.join and (mode != "config_server" or flags.nats_url):
        raise ConfigError("--join is for --run_mode config_server without --nats_url")
    if mode == "config_server" and "," in flags.config_server_host:
        raise ConfigError(f"--config_server_host {flags.config_server_host}: a config server binds one address")
    if flags.planner != "off" and (mode not in ("config_server", "pd_master") or (mode == "pd_master" and ways)):
        raise ConfigError(f"--planner {flags.planner}: it runs in config servers, or in the pd_master that keeps the queue")
    if min(flags.ttft_objective, flags.tpot_objective) <= 0:
        raise ConfigError("--ttft_objective and --tpot_objective must be seconds above 0")
    _check_files(flags)
    _check_secrets(flags)


def _check_files(flags: argparse.Namespace) -> None:
    if bool(flags.tls_cert) != bool(flags.tls_key):
        raise ConfigError("--tls_cert and --tls_key go together: give both or neither")
    if flags.tls_cert and not flags.tls_ca and flags.run_mode in ("config_server", "pd_master"):
        raise ConfigError("--tls_cert needs --tls_ca too: this process reaches its own queue, and other doors, by TLS")
    for name in ("tls_cert", "tls_key", "tls_ca"):
        if (path := getattr(flags, name)) and not Path(path).is_file():
            raise ConfigError(f"--{name} {path}: there is no such file")


def _check_secrets(flags: argparse.Namespace) -> None:
    """What other machines can reach needs the token."""
    if flags.cluster_token or flags.insecure:
        return
    if flags.run_mode == "config_server" and not is_loopback(flags.config_server_host):
        raise ConfigError(f"--config_server_host {flags.config_server_host}: not a loopback address: give a cluster token "
                          "(TOKENMILL_CLUSTER_TOKEN or --cluster_token_file), the same one to all processes, or say --insecure")
    if flags.run_mode == "pd_master" and not (flags.nats_url or flags.config_server_host or is_loopback(flags.host)):
        raise ConfigError(f"--host {flags.host}: not a loopback address, and this pd_master keeps the queue: give a cluster token "
                          "(TOKENMILL_CLUSTER_TOKEN or --cluster_token_file), the same one to all processes, or say --insecure")
