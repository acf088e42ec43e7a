"""What `tokenmill serve` does for several ranks: the desk on node 0, the way to it from other nodes, and one process per rank.

    rank that leads its dp group    workers.worker: I/O process, and its engine
    any other rank                  workers.follower
"""

import argparse
import contextlib
import logging
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from coordinator import desk_record, rendezvous
from coordinator.cluster_token import is_loopback
from coordinator.desk import Desk
from coordinator.errors import ConfigError, Unavailable
from coordinator.group_plan import DEFAULT_PORT, TOKEN_VARIABLE, GroupPlan
from coordinator.queue_record import QueueUrls

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
FOLLOWER = "workers.follower"
FLAGS = ("ep_exchange", "ep_redundant_experts", "ep_rebalance_steps", "one_shot_all_reduce_bytes")
SWITCHES = ("enable_prefill_microbatch_overlap", "enable_decode_microbatch_overlap")


def plan_of(flags: argparse.Namespace) -> GroupPlan:
    """Raises ConfigError for flags that do not go together."""
    plan = GroupPlan(tp=flags.tp, dp=flags.dp, moe_mode=flags.moe_mode, nnodes=flags.nnodes, node_rank=flags.node_rank)
    if flags.run_mode not in ("normal", "prefill", "decode") and (plan.tp, plan.nnodes) != (1, 1):
        raise ConfigError(f"--run_mode {flags.run_mode} computes nothing: --tp, --dp and --nnodes belong to its workers")
    for name in SWITCHES:
        if getattr(flags, name) and plan.is_one_rank:
            raise ConfigError(f"--{name}: one rank exchanges no tokens with anybody: there is nothing to overlap (--tp, MOE_MODE=EP)")
    for name in FLAGS:
        if plan.is_one_rank and getattr(flags, name) not in ("auto", 0):
            raise ConfigError(f"--{name} {getattr(flags, name)}: there is one rank: it has all experts and nothing to sum up (--tp)")
    if flags.kv_transfer == "mapped" and flags.run_mode != "normal" and plan.ranks_per_node % plan.ranks_per_dp_group:
        raise ConfigError(f"--kv_transfer mapped: dp groups of {plan.ranks_per_dp_group} ranks over nodes of {plan.ranks_per_node}, and "
                          "memory of one node is not mapped on another: use auto or collective")
    host = _host_of_node_0(flags)
    if plan.nnodes > 1 and not is_loopback(host):
        if not flags.cluster_token and not flags.insecure:
            raise ConfigError(f"--nccl_host {host}: not a loopback address: give a cluster token (TOKENMILL_CLUSTER_TOKEN or "
                              "--cluster_token_file), the same one on all nodes, or say --insecure")
        for name in ("nats_url", "redis_url"):
            if is_loopback(urlsplit(getattr(flags, name)).hostname or ""):
                raise ConfigError(f"--{name} names a loopback address, which node 1 does not reach")
    return plan


def is_other_node(flags: argparse.Namespace) -> bool:
    """Not node 0: no REST shim and no queue of its own here."""
    return bool(flags.node_rank)


def ask_node_0(flags: argparse.Namespace) -> QueueUrls:
    """Waits for node 0; raises ConfigError when the nodes' flags differ."""
    return _ask(flags)[1]


def _ask(flags: argparse.Namespace) -> tuple[str, QueueUrls]:
    desk, found = rendezvous.ask_services(lambda: _desk_address(flags), flags.cluster_token, node_rank=flags.node_rank,
                                          facts=_node_facts(flags))
    return desk, QueueUrls(**found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where this node's ranks meet all others, and what they need in their environment for it."""

    address: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def open_desk(flags: argparse.Namespace, urls: QueueUrls, stack: contextlib.ExitStack) -> Meeting:
    """`urls` are told to other nodes."""
    plan = plan_of(flags)
    if plan.is_one_rank:
        return Meeting()
    token = flags.cluster_token if plan.nnodes > 1 else secrets.token_hex(16)
    environment = {TOKEN_VARIABLE: token}
    if plan.node_rank:
        return Meeting(address=_ask(flags)[0], environment=environment)
    host, port = (_host_of_node_0(flags), flags.nccl_port or DEFAULT_PORT) if plan.nnodes > 1 else (LOOPBACK, flags.nccl_port)
    desk = Desk(host, port, token, services={"nats_url": urls.nats_url, "redis_url": urls.redis_url}, facts=_node_facts(flags))
    stack.enter_context(desk)
    if _is_met_through_redis(flags):
        desk_record.tell(flags.redis_url, _group_name(flags), desk.address)
    return Meeting(address=desk.address, environment=environment)


def processes(flags: argparse.Namespace, role: str, args: list[str], desk: str) -> list[tuple[str, str, list[str]]]:
    """Name, module and arguments of each of this node's ranks. `args` are the flags that any worker gets."""
    plan = plan_of(flags)
    if plan.is_one_rank:
        return [(f"{role} worker", "workers.worker", args)]
    found = []
    for local_rank, rank in enumerate(plan.local_ranks):
        mine = [*args, "--tp", str(plan.tp), "--dp", str(plan.dp), "--moe_mode", plan.moe_mode, "--rank", str(rank), "--local_rank",
                str(local_rank), "--num_local", str(plan.ranks_per_node), "--desk", desk]
        for name in FLAGS:
            mine += [f"--{name}", str(getattr(flags, name))]
        mine += [f"--{name}" for name in SWITCHES if getattr(flags, name)]
        if plan.is_leader(rank):
            if flags.worker_id and plan.dp > 1:
                mine += ["--worker_id", f"{flags.worker_id}-{plan.dp_rank(rank)}"]
            found.append((f"{role} worker, rank {rank}", "workers.worker", mine))
        else:
            found.append((f"rank {rank}", FOLLOWER, mine))
    return found


def _is_met_through_redis(flags: argparse.Namespace) -> bool:
    return flags.nnodes > 1 and bool(flags.redis_url) and not flags.nccl_host


def _host_of_node_0(flags: argparse.Namespace) -> str:
    return desk_record.own_address(flags.redis_url) if _is_met_through_redis(flags) else flags.nccl_host or LOOPBACK


def _desk_address(flags: argparse.Namespace) -> str:
    """"" while Redis does not know it."""
    if not _is_met_through_redis(flags):
        return f"{flags.nccl_host or LOOPBACK}:{flags.nccl_port or DEFAULT_PORT}"
    try:
        return desk_record.find(flags.redis_url, _group_name(flags))
    except Unavailable as error:
        log.warning("%s", error)
        return ""


def _group_name(flags: argparse.Namespace) -> str:
    return flags.worker_id or f"{flags.model_name}-{flags.run_mode}"


def _node_facts(flags: argparse.Namespace) -> dict[str, str]:
    return {"--tp": str(flags.tp), "--dp": str(flags.dp), "--nnodes": str(flags.nnodes), "MOE_MODE": flags.moe_mode,
            "--run_mode": flags.run_mode, "--model_name": flags.model_name}
