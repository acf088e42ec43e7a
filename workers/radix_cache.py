"""Which prefixes have their KV in the pool: a tree of full pages over token ids. Knows page ids and tokens, never bytes.

Each node is one full page; a child's key is the tuple of the tokens that its page holds, so equal tokens mean an equal page
(no hashes to collide). A node is locked while a sequence uses it. Locks count along the whole path to the root, so an unlocked
node has only unlocked nodes below it, and `num_evictable` is simply how many nodes are unlocked. Eviction takes the leaf that
was used longest ago; time is a counter of operations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

from workers.page_pool import PagePool

PageKey = tuple[int, ...]


class Journal(Protocol):
    """Is told of every page that can be found, and of its end, by a digest over the path to it (block_journal.py)."""

    root: bytes

    def digest_of(self, parent: bytes, page_tokens: Sequence[int]) -> bytes: ...
    def gained(self, digest: bytes) -> None: ...
    def lost(self, digest: bytes) -> None: ...


@dataclass(slots=True, eq=False)
class Node:
    """One cached page. The tree holds one pool reference for it."""

    key: PageKey
    page: int
    parent: "Node | None"
    children: dict[PageKey, "Node"] = field(default_factory=dict)
    locks: int = 0
    last_used: int = 0
    digest: bytes = b""      # without a journal: none


class RadixCache:
    """A prefix tree over pages of `pool`. Statistics count tokens: looked up, and found."""

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool = True, journal: Journal | None = None) -> None:
        self.page_size = page_size
        self.num_nodes = 0
        self.num_evictable = 0
        self.num_looked_up_tokens = 0
        self.num_hit_tokens = 0
        self._enabled = enabled
        self._pool = pool
        self._journal = journal
        self._root = Node((), -1, None, digest=journal.root if journal is not None else b"")
        self._now = 0
        self._serial = count()
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last_used, serial, node); entries that no longer hold are skipped

    def match(self, token_ids: Sequence[int], limit: int) -> list[Node]:
        """The longest cached path for the full pages within token_ids[:limit], locked for the caller (see `unlock`)."""
        path: list[Node] = []
        node = self._root
        for key in self._keys(token_ids, 0, limit):
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        self._lock(path)
        return path

    def count_lookup(self, num_tokens: int, num_hit_tokens: int) -> None:
        """For the statistics: once per sequence that was admitted (a match may be tried again while the pool is full)."""
        self.num_looked_up_tokens += num_tokens
        self.num_hit_tokens += num_hit_tokens

    def insert(self, path: list[Node], token_ids: Sequence[int], pages: list[int], limit: int) -> None:
        """Add the full pages within token_ids[:limit] below the locked `path`, extending it in place, locked too.

        `pages` are the caller's, one reference each. Where the tree has an equal page already, the caller's is given back and
        `pages` names the tree's from then on, so that equal prompts that ran side by side end up sharing.
        """
        if not self._enabled:
            return
        node = path[-1] if path else self._root
        added: list[Node] = []
        for key in self._keys(token_ids, len(path), limit):
            index = len(path) + len(added)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, pages[index], node)
                self._pool.retain([pages[index]])
                self.num_nodes += 1
                self.num_evictable += 1
                if self._journal is not None:
                    child.digest = self._journal.digest_of(node.digest, key)
                    self._journal.gained(child.digest)
            elif child.page != pages[index]:
                self._pool.retain([child.page])
                self._pool.release([pages[index]])
                pages[index] = child.page
            added.append(child)
            node = child
        path.extend(added)
        self._lock(added)

    def unlock(self, path: list[Node]) -> None:
        """Undo the locks of `match` and `insert` on this path and empty it."""
        for node in reversed(path):
            assert node.locks > 0
            node.locks -= 1
            if not node.locks:
                self.num_evictable += 1
                self._offer(node)
        path.clear()

    def evict(self, wanted: int) -> int:
        """Drop up to `wanted` unlocked pages, least recently used leaves first. Returns how many."""
        evicted = 0
        while evicted < wanted and self.num_evictable:
            entry = heappop(self._leaves)
            node = entry[2]
            if not _holds(entry) or node.parent is None:
                continue
            parent = node.parent
            del parent.children[node.key]
            node.parent = None
            self._pool.release([node.page])
            self.num_nodes -= 1
            self.num_evictable -= 1
            evicted += 1
            if self._journal is not None:
                self._journal.lost(node.digest)
            self._offer(parent)
        return evicted

    def pages(self) -> list[int]:
        return [node.page for node in self._walk()]

    def check_integrity(self) -> None:
        nodes = list(self._walk())
        assert len(nodes) == self.num_nodes
        assert sum(not node.locks for node in nodes) == self.num_evictable
        offered = {id(entry[2]) for entry in self._leaves if _holds(entry)}
        for node in nodes:
            assert node.locks >= sum(child.locks for child in node.children.values()), f"page {node.page}: locked below only"
            assert node.locks or node.children or id(node) in offered, f"page {node.page} could never be evicted"
            assert all(key == child.key and child.parent is node for key, child in node.children.items())

    def _keys(self, token_ids: Sequence[int], first_page: int, limit: int) -> Iterator[PageKey]:
        size = self.page_size
        for start in range(first_page * size, min(limit, len(token_ids)) - size + 1, size):
            yield tuple(token_ids[start:start + size])

    def _lock(self, nodes: list[Node]) -> None:
        self._now += 1
        for node in nodes:
            if not node.locks:
                self.num_evictable -= 1
            node.locks += 1
            node.last_used = self._now

    def _offer(self, node: Node) -> None:
        """Make an unlocked leaf known to `evict`."""
        if node.locks or node.children or node.parent is None:
            return
        heappush(self._leaves, (node.last_used, next(self._serial), node))
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = list({id(e[2]): e for e in self._leaves if _holds(e)}.values())
            heapify(self._leaves)

    def _walk(self) -> Iterator[Node]:
        pending = list(self._root.children.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            yield node


def _holds(entry: tuple[int, int, Node]) -> bool:
    last_used, _, node = entry
    return node.last_used == last_used and not node.locks and not node.children and node.parent is not None
