"""This process among the ranks of its group: from the desk to working collectives, and out again when the group breaks.

    desk: join ------------------------- formed (generation, endpoints of all) --------- broken -> this process ends at once
          | listeners of our own           | store of rank 0, process group, step channels

With MOE_MODE=EP all ranks are one group: every step needs all of them. Otherwise each dp group is one by itself, and the death of a
rank concerns nobody else.
"""

import contextlib
import fcntl
import hmac
import logging
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from coordinator import rendezvous
from coordinator.errors import ConfigError, MalformedMessage, Unavailable
from coordinator.rendezvous import CRASHED, DONE, PEER_STATUS, VANISHED, Broken, Formed, Member, Seat
from workers import lockstep
from workers.channel import BlockingChannel
from workers.engine_messages import GroupView, RankView
from workers.engine_sizes import EngineSizes
from workers.executor import Executor
from workers.leader import Followers, LeaderExecutor
from workers.loader import weights_hash
from workers.lockstep import Lockstep
from workers.model_config import ModelConfig
from workers.parallel import Parallel, ParallelSizes, without_multicast
from workers.settings import EngineSettings, RankSettings
from workers.step_messages import Hello, decode, encode

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a backstop: dead and stopped peers are noticed by the desk, hung ones by their I/O process
VERDICT_S = 3.0                             # how long a rank whose collective failed waits to hear that another one is to blame
SIOCGIFADDR = 0x8915


def sizes_of(ranks: RankSettings) -> ParallelSizes:
    return ParallelSizes(tp=ranks.tp, dp=ranks.dp, moe_mode=ranks.moe_mode, exchange=ranks.ep_exchange,
                         redundant_experts=ranks.ep_redundant_experts, rebalance_steps=ranks.ep_rebalance_steps,
                         one_shot_bytes=ranks.one_shot_all_reduce_bytes,
                         prefill_overlap=ranks.prefill_overlap, decode_overlap=ranks.decode_overlap)


def checked(settings: EngineSettings, config: ModelConfig) -> ParallelSizes:
    """Sizes of the deployment, checked against the model. Raises ConfigError."""
    sizes = sizes_of(settings.ranks)
    sizes.validate(config, keeps_fp8=settings.device != "cpu")
    return sizes


def is_alone(settings: EngineSettings, config: ModelConfig) -> bool:
    """No other rank takes part in this one's steps. Raises ConfigError for sizes that the model cannot have."""
    sizes = checked(settings, config)
    return sizes.attn_tp == 1 and not sizes.is_ep


class Group:
    """A formed group, as one of its ranks sees it."""

    def __init__(self, settings: RankSettings, sizes: ParallelSizes, rank: int, member: Member, formed: Formed, parallel: Parallel,
                 listeners: dict[str, socket.socket], token: str, device: torch.device) -> None:
        """`sizes` and `rank` are those within the group."""
        self.rank = rank
        self.sizes = sizes
        self.generation = formed.generation
        self.parallel = parallel
        self.token = token
        self.hosts = tuple(endpoints.get("host", "") for endpoints in formed.endpoints)
        self.pids = tuple(int(endpoints.get("pid", "0")) for endpoints in formed.endpoints)
        self._settings = settings
        self._device = device
        self._member = member
        self._formed = formed
        self._listeners = listeners
        self._followers: Followers | None = None

    @property
    def leader_rank(self) -> int:
        return self.rank - self.parallel.attn.rank

    @property
    def is_leader_here(self) -> bool:
        """The leader runs on this node: it can map our memory."""
        return self.parallel.attn.rank <= self._settings.local_rank

    def agree(self, sizes: EngineSizes) -> EngineSizes:
        """The same number of pages everywhere: a page id means the same page on every rank. 0 stays 0: the executor asks later."""
        return replace(sizes, num_pages=self.smallest(sizes.num_pages)) if sizes.num_pages else sizes

    def smallest(self, value: int) -> int:
        """Of all ranks' values."""
        return self.parallel.world.least(value, self._device)

    # ---- a leader's ----

    def lead(self, executor: Executor, page_size: int) -> Executor:
        """The executor whose steps the followers run too. Waits until they are ready."""
        count = self.sizes.attn_tp - 1
        if not count:
            return executor
        followers = Followers(self._listeners.pop("steps"), count, token=self.token, generation=self.generation,
                              first_rank=self.rank, pool=executor.kv_cache)
        self._followers = followers
        return LeaderExecutor(executor, followers, page_size)

    def expect_end(self) -> None:
        """We were told to end, and so were the others."""
        self._member.expects_end = True

    def stop_followers(self) -> None:
        self.expect_end()
        if self._followers is not None:
            self._followers.stop()

    @property
    def view(self) -> GroupView:
        """Of the leader's dp group."""
        first = self._settings.rank
        mine = range(self.rank, self.rank + self.sizes.attn_tp)
        ranks = tuple(RankView(rank=first + index, host=self.hosts[rank], pid=self.pids[rank]) for index, rank in enumerate(mine))
        whole = self._settings
        return GroupView(generation=self.generation, tp=whole.tp, dp=whole.dp, moe_mode=whole.moe_mode,
                         dp_rank=whole.rank // (whole.tp // whole.dp), ranks=ranks)

    def lockstep(self) -> Lockstep | None:
        """None where dp groups do not step together."""
        if not self.sizes.is_ep or self.sizes.dp == 1:
            return None
        if self.rank == 0:
            return lockstep.conduct(self._listeners.pop("rounds"), self.sizes.dp, self._check_leader)
        hello = Hello(token=self.token, generation=self.generation, rank=self.rank)
        return lockstep.keep_step(_address(self._formed.endpoints[0]["rounds"]), encode(hello))

    def _check_leader(self, data: bytes) -> int:
        hello = decode(data)
        if not (isinstance(hello, Hello) and hmac.compare_digest(hello.token.encode(), self.token.encode())
                and hello.generation == self.generation):
            raise MalformedMessage("no leader of this group")
        return self.sizes.dp_rank(hello.rank)

    # ---- a follower's ----

    def to_leader(self) -> BlockingChannel:
        sock = socket.create_connection(_address(self._formed.endpoints[self.leader_rank]["steps"]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return BlockingChannel(sock)

    def lost_leader(self) -> int:
        """The leader's channel ended: the exit status, if the desk does not end this process first."""
        self._member.others_left_first(VERDICT_S)
        return PEER_STATUS[VANISHED]


@contextlib.contextmanager
def joined(settings: EngineSettings, config: ModelConfig, engine: EngineSizes) -> Iterator[Group]:
    """Wait for all ranks, and be one of them until the block ends. An error in it is told to the others, unless they are its cause.

    `settings` are resolved. Raises ConfigError.
    """
    ranks, sizes = settings.ranks, checked(settings, config)
    name, rank = "all", ranks.rank
    if not sizes.is_ep and sizes.dp > 1:  # dp groups never meet: each is a group of its own
        name, rank = f"dp{sizes.dp_rank(ranks.rank)}", sizes.attn_tp_rank(ranks.rank)
        sizes = replace(sizes, tp=sizes.attn_tp, dp=1)
    token = rendezvous.token()
    member = Member.connect(ranks.desk, token)
    host = member.local_host
    listeners = {}
    endpoints = {"host": socket.gethostname(), "pid": str(os.getpid())}
    if rank == 0:
        store = TCPStore(host, 0, sizes.tp, is_master=True, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False)
        endpoints["store"] = f"{host}:{store.port}"
    if sizes.attn_tp_rank(rank) == 0:
        listeners = {"steps": socket.create_server((host, 0)), "rounds": socket.create_server((host, 0))}
        endpoints |= {kind: f"{host}:{listener.getsockname()[1]}" for kind, listener in listeners.items()}
    seat = Seat(group=name, rank=rank, size=sizes.tp, facts=_facts(settings, engine), endpoints=endpoints)
    try:
        formed = member.join(seat)
    except Unavailable as error:
        log.warning("%s", error)
        raise GroupBroken from None
    member.watch(_end)
    try:
        if rank != 0:
            store = TCPStore(*_address(formed.endpoints[0]["store"]), sizes.tp, is_master=False, timeout=COLLECTIVE_TIMEOUT,
                             wait_for_workers=False)
        _choose_interface(host)
        without_multicast()
        device = torch.device(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=sizes.tp,
                                timeout=COLLECTIVE_TIMEOUT, device_id=device if device.type == "cuda" else None)
        yield Group(ranks, sizes, rank, member, formed, Parallel.join(sizes), listeners, token, device)
        member.leave(DONE)
    except ConfigError as error:
        member.leave(DONE, str(error))
        raise
    except Exception as error:
        if member.others_left_first(VERDICT_S):
            raise GroupBroken from None  # `_end` is about to end this process
        log.exception("rank %d failed", rank)
        member.leave(CRASHED, f"{type(error).__name__}: {error}")
        raise


class GroupBroken(Exception):
    """Another rank is gone. Not an error of this one."""


def _end(broken: Broken) -> None:
    """At once: the main thread may wait for a dead rank in a collective that nothing else can end."""
    whose = f"rank {broken.rank}" if broken.rank >= 0 else "the desk"
    log.warning("the group is broken: %s %s %s", whose, broken.why, broken.text)
    logging.shutdown()
    os._exit(broken.status)


def _facts(settings: EngineSettings, engine: EngineSizes) -> dict[str, str]:
    """What must be the same on all ranks, by the name of the flag."""
    ranks = settings.ranks
    return {"the model's weights": weights_hash(Path(settings.model_dir)), "--device": settings.device.partition(":")[0],
            "--run_mode": settings.role, "--kv_transfer": settings.kv_transfer,
            "--data_type": str(engine.dtype), "--page_size": str(engine.page_size),
            "--max_req_total_len": str(engine.max_seq_len), "--running_max_req_size": str(engine.max_num_seqs),
            "--chunked_prefill_size": str(engine.chunk_size), "--graph_max_batch_size": str(settings.graph_max_batch_size),
            "--disable_cudagraph": str(not settings.use_cuda_graphs), "--dp": str(ranks.dp), "MOE_MODE": ranks.moe_mode,
            "--ep_exchange": ranks.ep_exchange, "--ep_redundant_experts": str(ranks.ep_redundant_experts),
            "--ep_rebalance_steps": str(ranks.ep_rebalance_steps), "--one_shot_all_reduce_bytes": str(ranks.one_shot_all_reduce_bytes),
            "--enable_prefill_microbatch_overlap": str(ranks.prefill_overlap),
            "--enable_decode_microbatch_overlap": str(ranks.decode_overlap)}


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)


def _choose_interface(host: str) -> None:
    """Collectives use the network that the desk is reached by, unless the user says otherwise."""
    for index_name in socket.if_nameindex():
        name = index_name[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(reply[20:24]) == host:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
                return
