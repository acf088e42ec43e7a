"""What a prefix cache gained and lost since it was last asked: digests of pages, a page that came and went counted as neither."""

from coordinator.prefix_blocks import DIGEST_BYTES, ROOT, next_digest
from workers.engine_messages import Blocks


class BlockJournal:
    """Filled by the cache, emptied by the engine (`take`)."""

    root = ROOT
    digest_of = staticmethod(next_digest)

    def __init__(self) -> None:
        self._held: set[bytes] = set()
        self._added: set[bytes] = set()
        self._evicted: set[bytes] = set()
        self._is_all_wanted = False

    def gained(self, digest: bytes) -> None:
        self._held.add(digest)
        if digest in self._evicted:
            self._evicted.remove(digest)
        else:
            self._added.add(digest)

    def lost(self, digest: bytes) -> None:
        self._held.discard(digest)
        if digest in self._added:
            self._added.remove(digest)
        else:
            self._evicted.add(digest)

    def want_all(self) -> None:
        """The next `take` tells everything that is held."""
        self._is_all_wanted = True

    def take(self) -> Blocks | None:
        """The changes since the last call; None if there are none."""
        if self._is_all_wanted:
            told = Blocks(added=b"".join(self._held), evicted=b"", is_all=True)
        elif self._added or self._evicted:
            told = Blocks(added=b"".join(self._added), evicted=b"".join(self._evicted))
        else:
            return None
        self._added, self._evicted, self._is_all_wanted = set(), set(), False
        return told


def split_digests(packed: bytes) -> list[bytes]:
    return [packed[start:start + DIGEST_BYTES] for start in range(0, len(packed), DIGEST_BYTES)]
