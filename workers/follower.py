"""A rank that only computes: `python -m workers.follower …`, started by `tokenmill serve`. No queue, no scheduler, no sampling.

It loads its share of the model, connects to the leader of its dp group, and does what that one says, in order: steps and page copies.
It ends with its leader or with the group, and its supervisor starts it again.
"""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from coordinator import lifeline
from coordinator.errors import ConfigError, TokenmillError
from coordinator.messages import KVRank
from coordinator.rendezvous import PEER_STATUS, VANISHED
from coordinator.sampling import SamplingParams
from workers import group as groups
from workers.channel import BlockingChannel
from workers.engine import load_executor, open_desk, ways_to_pool
from workers.engine_sizes import choose_sizes, resolve
from workers.executor import Executor
from workers.model_config import ModelConfig
from workers.page_copier import PageCopier
from workers.sequence import ImportSource, Sequence
from workers.step import PageCopy
from workers.step_messages import Copied, Copy, Hello, Stop, decode, encode
from workers.worker import CONFIG_STATUS, parse

log = logging.getLogger(__name__)

NOBODY = Sequence(job_id="of the leader", token_ids=[], num_prompt=0, params=SamplingParams(), max_kv_tokens=0)


class Follower:
    """A loaded executor and the leader's messages."""

    def __init__(self, executor: Executor, channel: BlockingChannel, page_size: int, attn_rank: int, *,
                 is_leader_here: bool) -> None:
        self._executor = executor
        self._channel = channel
        self._page_size = page_size
        self._is_leader_here = is_leader_here
        self._numbers: dict[int, int] = {}     # id(copy) -> the leader's number for it
        self._copier = PageCopier(executor.kv_cache, self._copied, attn_rank)

    def run(self) -> bool:
        """True after Stop; False when the leader's channel ended without one."""
        for data in self._channel:
            message = decode(data, self._page_size)
            if isinstance(message, Copy):
                self._copy(message)
            elif isinstance(message, Stop):
                return True
            elif not isinstance(message, Hello | Copied):
                self._executor.follow(message)
        return False

    def close(self) -> None:
        self._copier.close()

    def _copy(self, message: Copy) -> None:
        # The leader's I/O process chose the ways; memory of its host means nothing on another.
        ranks = tuple(KVRank(address=address if self._is_leader_here else "", desk=desk) for address, desk in message.ranks)
        copy = PageCopy(sequence=NOBODY, src_pages=message.src_pages, dst_pages=message.dst_pages, num_tokens=message.num_tokens,
                        source=ImportSource(ranks=ranks, num_pages=message.num_pages, page_ids=tuple(message.src_pages),
                                            num_tokens=message.num_tokens, layout=message.kv_layout))
        self._numbers[id(copy)] = message.copy_id
        self._copier.start(copy)

    def _copied(self, copy: PageCopy, error: str) -> None:
        with contextlib.suppress(OSError):  # the leader is gone, and so are we in a moment
            self._channel.send(encode(Copied(copy_id=self._numbers.pop(id(copy)), error=error)))


def _run(argv: list[str] | None) -> int:
    worker, level = parse(argv)
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s rank %(name)s: %(message)s")
    settings = resolve(worker.engine)
    config = ModelConfig.from_dir(Path(settings.model_dir))
    groups.checked(settings, config)
    sizes = choose_sizes(settings, config)
    with groups.joined(settings, config, sizes) as group:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its leader finishes what it has, then says Stop
        sizes = group.agree(sizes)
        executor = load_executor(settings, config, sizes, lambda loaded, total: None, group)
        executor.warm_up()
        cache = executor.kv_cache
        desk = open_desk(settings, cache)  # compiles, on a GPU; a leader waits for the Hello of whoever is connected, and not for long
        way = ways_to_pool(settings, cache, desk, is_on_leaders_host=group.is_leader_here)
        channel = group.to_leader()
        channel.send(encode(Hello(token=group.token, generation=group.generation, rank=group.rank, num_pages=cache.num_pages,
                                  address=way.address, desk=way.desk)))
        print(f"rank {settings.ranks.rank} follows its leader", file=sys.stderr, flush=True)
        follower = Follower(executor, channel, sizes.page_size, group.parallel.attn.rank, is_leader_here=group.is_leader_here)
        if is_stopped := follower.run():
            group.expect_end()
        follower.close()
        if desk is not None:
            desk.close()
        return 0 if is_stopped else group.lost_leader()


def main(argv: list[str] | None = None) -> int:
    lifeline.hold_on()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return _run(argv)
    except groups.GroupBroken:
        return PEER_STATUS[VANISHED]
    except TokenmillError as error:
        print(f"rank: {error}", file=sys.stderr)
        return CONFIG_STATUS if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # not through torch's teardown: other ranks may be gone already
