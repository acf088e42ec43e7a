"""A hand-over to several ranks is done when the last of them has its pages, and failed when any of them has none."""

import queue
import socket
import threading
from pathlib import Path

import pytest
import torch

from coordinator.messages import KVRank
from coordinator.sampling import SamplingParams
from workers.channel import BlockingChannel
from workers.kv_cache import KVCache
from workers.leader import Followers, GroupCopier
from workers.model_config import ModelConfig
from workers.random_model import write_random_model
from workers.sequence import ImportSource, Sequence
from workers.step import PageCopy
from workers.step_messages import Copied, Copy, Hello, Stop, decode, encode

PAGES, TOKEN = 8, "t"


@pytest.fixture
def pool(tmp_path: Path) -> KVCache:
    config = ModelConfig.from_dir(write_random_model(tmp_path / "m", "deepseek-v3", seed=1))
    return KVCache.create(config, PAGES, 4, torch.float32, torch.device("cpu"))


class Rank:
    """A follower's end of the channel."""

    def __init__(self, port: int, rank: int, **hello: object) -> None:
        self.channel = BlockingChannel(socket.create_connection(("127.0.0.1", port)))
        self._messages = iter(self.channel)
        values = {"token": TOKEN, "generation": 5, "rank": rank, "num_pages": PAGES, "address": f"pool-{rank}", **hello}
        self.channel.send(encode(Hello(**values)))  # type: ignore[arg-type]

    def next(self) -> object:
        return decode(next(self._messages))

    def answer(self, copy_id: int, error: str = "") -> None:
        self.channel.send(encode(Copied(copy_id=copy_id, error=error)))


def gather(pool: KVCache, *hellos: dict[str, object]) -> tuple[Followers, list[Rank]]:
    """Two followers of the leader at rank 2, after whoever else comes first."""
    listener = socket.create_server(("127.0.0.1", 0))
    found: queue.Queue[Followers] = queue.Queue()

    def lead() -> None:
        found.put(Followers(listener, 2, token=TOKEN, generation=5, first_rank=2, pool=pool))

    threading.Thread(target=lead, daemon=True).start()
    port = listener.getsockname()[1]
    strangers = [Rank(port, 3, **hello) for hello in hellos]
    ranks = [Rank(port, rank) for rank in (4, 3)]
    followers = found.get(timeout=20)
    listener.close()
    for stranger in strangers:
        stranger.channel.close()
    return followers, ranks


def page_copy(pool: KVCache) -> PageCopy:
    sequence = Sequence(job_id="j", token_ids=[1] * 9, num_prompt=8, params=SamplingParams(), max_kv_tokens=9)
    source = ImportSource(ranks=(KVRank(address=pool.address),), num_pages=PAGES, page_ids=(1, 2), num_tokens=8, layout=pool.layout(""))
    return PageCopy(sequence=sequence, source=source, src_pages=[1, 2], dst_pages=[5, 6], num_tokens=8)


def test_only_followers_of_this_generation_are_taken_and_their_pools_are_known_by_rank(pool: KVCache) -> None:
    followers, ranks = gather(pool, {"generation": 4}, {"token": "wrong"}, {"num_pages": 9})
    assert [way.address for way in followers.ways] == ["pool-3", "pool-4"]
    followers.stop()
    assert all(isinstance(rank.next(), Stop) for rank in ranks)
    followers.close()
    for rank in ranks:
        rank.channel.close()


def test_whoever_connects_and_says_nothing_is_not_waited_for(pool: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.leader.GREETING_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger, rank = socket.create_connection(listener.getsockname()), Rank(listener.getsockname()[1], 1)
        Followers(listener, 1, token=TOKEN, generation=5, first_rank=0, pool=pool).close()
        stranger.close()
        rank.channel.close()


@pytest.mark.parametrize("error", ["", "Unavailable: gone"])
def test_a_copy_is_done_when_the_last_rank_says_so_with_the_first_error_of_any(pool: KVCache, error: str) -> None:
    followers, ranks = gather(pool)
    done: queue.Queue[tuple[PageCopy, str]] = queue.Queue()
    copier = GroupCopier(followers, pool, lambda copy, error: done.put((copy, error)))
    copy = page_copy(pool)
    copier.start(copy)
    asked = [rank.next() for rank in ranks]
    assert all(isinstance(message, Copy) and list(message.dst_pages) == [5, 6] for message in asked)
    ranks[0].answer(0, error)
    with pytest.raises(queue.Empty):
        done.get(timeout=0.3)
    ranks[1].answer(0)
    assert done.get(timeout=20) == (copy, error)
    copier.close()
    followers.close()
    for rank in ranks:
        rank.channel.close()
