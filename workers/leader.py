"""The leader of a dp group: whatever its own executor does, its followers do too.

    scheduler -> LeaderExecutor -> step to every follower, then the own executor: all ranks meet in the collectives of the forward pass
                 GroupCopier    -> page copy to every follower, and the own copier: done when all are
"""

import contextlib
import hmac
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import count

from coordinator.errors import MalformedMessage, Unavailable
from coordinator.messages import KVRank
from workers.batch import ForwardBatch
from workers.channel import GREETING_S, BlockingChannel
from workers.executor import Executor, Flight
from workers.kv_cache import KVCache
from workers.page_copier import PageCopier
from workers.sequence import Sequence
from workers.step import PageCopy
from workers.step_messages import Copied, Copy, Hello, Stop, decode, encode, encode_step

log = logging.getLogger(__name__)


class Followers:
    """The channels to all followers, in no order; `ways` lead to their pools, in the order of ranks."""

    def __init__(self, listener: socket.socket, count: int, *, token: str, generation: int, first_rank: int, pool: KVCache) -> None:
        """Waits for all of them to have loaded. (If one never does, the group breaks, and this process ends.)"""
        ways = [KVRank()] * count
        self.on_copied: Callable[[Copied], None] = lambda copied: None
        self._channels: list[BlockingChannel] = []
        while len(self._channels) < count:
            sock, peer = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            channel = BlockingChannel(sock)
            try:
                data, messages = channel.greeting(GREETING_S)
                hello = decode(data)
                if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token.encode(), token.encode()):
                    raise MalformedMessage("no follower of ours")
                if hello.generation != generation or hello.num_pages != pool.num_pages:
                    raise MalformedMessage(f"rank {hello.rank}: generation {hello.generation}, {hello.num_pages} pages")
            except MalformedMessage as error:
                log.warning("a connection from %s was closed: %s", peer[0], error)
                channel.close()
                continue
            ways[hello.rank - first_rank - 1] = KVRank(address=hello.address, desk=hello.desk)
            self._channels.append(channel)
            threading.Thread(target=self._listen, args=(messages,), name=f"rank {hello.rank}", daemon=True).start()
        self.ways = tuple(ways)

    def __len__(self) -> int:
        return len(self._channels)

    def send(self, data: bytes) -> None:
        """Raises Unavailable when one is gone: the group is about to break."""
        try:
            for channel in self._channels:
                channel.send(data)
        except OSError as error:
            raise Unavailable(f"a follower is gone: {error}") from None

    def stop(self) -> None:
        with contextlib.suppress(Unavailable):
            self.send(encode(Stop()))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _listen(self, messages: Iterator[bytes]) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            for data in messages:
                message = decode(data)
                if isinstance(message, Copied):
                    self.on_copied(message)


class LeaderExecutor:
    """An executor whose steps all ranks of the dp group run."""

    def __init__(self, own: Executor, followers: Followers, page_size: int) -> None:
        self.depth = own.depth
        self.followers = followers
        self._own = own
        self._page_size = page_size

    @property
    def kv_cache(self) -> KVCache:
        return self._own.kv_cache

    def launch(self, batch: ForwardBatch, sampled: list[Sequence]) -> Flight:
        self.followers.send(encode_step(batch, self._page_size))
        return self._own.launch(batch, sampled)

    def follow(self, batch: ForwardBatch) -> None:
        raise AssertionError("a leader follows nobody")

    def warm_up(self) -> None:
        self._own.warm_up()


class GroupCopier:
    """Copies a sequence's pages on every rank. `on_done(copy, error)`: the first error that any of them had, once all are through."""

    def __init__(self, followers: Followers, pool: KVCache, on_done: Callable[[PageCopy, str], None]) -> None:
        self._followers = followers
        self._on_done = on_done
        self._own = PageCopier(pool, lambda copy, error: self._one_done(self._ids[id(copy)], error))
        self._numbers = count()
        self._ids: dict[int, int] = {}                          # id(copy) -> its number, while it runs
        self._running: dict[int, tuple[PageCopy, int, str]] = {}  # number -> copy, ranks not done, first error
        self._lock = threading.Lock()
        followers.on_copied = lambda copied: self._one_done(copied.copy_id, copied.error)

    def start(self, copy: PageCopy) -> None:
        number = next(self._numbers)
        with self._lock:
            self._ids[id(copy)] = number
            self._running[number] = copy, len(self._followers) + 1, ""
        source, layout = copy.source, copy.source.layout
        self._followers.send(encode(Copy(
            copy_id=number, ranks=[(rank.address, rank.desk) for rank in source.ranks], num_pages=source.num_pages,
            layout={name: getattr(layout, name) for name in layout.__slots__}, src_pages=copy.src_pages, dst_pages=copy.dst_pages,
            num_tokens=copy.num_tokens)))
        self._own.start(copy)

    def close(self) -> None:
        self._own.close()

    def _one_done(self, number: int, error: str) -> None:
        with self._lock:
            copy, left, first_error = self._running[number]
            self._running[number] = copy, left - 1, first_error or error
            if left > 1:
                return
            del self._running[number], self._ids[id(copy)]
        self._on_done(copy, first_error or error)
