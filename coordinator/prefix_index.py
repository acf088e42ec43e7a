"""Which worker has which beginning of a prompt in its prefix cache, as Redis is told: a hint, bounded in size, never needed.

    {tokenmill}:prefix:<model>   hash   digest of a page (prefix_blocks.py) -> incarnation numbers of those who hold it, newest last
"""

from collections.abc import Sequence

from coordinator.store import Store

MOST_BLOCKS = 250_000      # pages that the index of one model names, some 100 to 200 bytes each; beyond that a random one is forgotten
MOST_HOLDERS = 8           # of one page: a system prompt that everybody has needs no list of everybody
TOLD_AT_ONCE = 512
SWEPT_AT_ONCE = 2000


class PrefixIndex:
    """Every method raises Unavailable when Redis does not answer."""

    def __init__(self, store: Store, model: str, *, most_blocks: int = MOST_BLOCKS) -> None:
        self._store = store
        self._key = f"prefix:{model}"
        self._most_blocks = most_blocks

    async def tell(self, incarnation: int, era: str, added: Sequence[bytes], evicted: Sequence[bytes]) -> str:
        """What a worker's cache gained and lost. Returns the era: if it is not the one given, nothing was noted; tell all then."""
        changes = [(digest, True) for digest in added] + [(digest, False) for digest in evicted]
        for start in range(0, max(1, len(changes)), TOLD_AT_ONCE):
            part = changes[start:start + TOLD_AT_ONCE]
            reply = await self._store.script("prefix_tell", [self._key], incarnation, era, self._most_blocks, MOST_HOLDERS,
                                             sum(is_added for _, is_added in part), *(digest for digest, _ in part))
            now = reply.decode() if isinstance(reply, bytes) else str(reply)
            if now != era:
                return now
        return era

    async def look_up(self, digests: Sequence[bytes]) -> dict[int, int]:
        """How many of these pages, from the first one on, each holder has. One round trip."""
        depths: dict[int, int] = {}
        if digests:
            # Only leaves are evicted: who holds a page holds all before it, even if the index forgot that.
            for depth, holders in enumerate(await self._store.hash_fields(self._key, digests), start=1):
                for holder in (holders or b"").split():
                    depths[int(holder)] = depth
        return depths

    async def sweep(self) -> None:
        """Forget holders that have no lease."""
        cursor = "0"
        while True:
            reply = await self._store.script("prefix_sweep", [self._key], cursor, SWEPT_AT_ONCE)
            cursor = reply.decode() if isinstance(reply, bytes) else str(reply)
            if cursor == "0":
                return
