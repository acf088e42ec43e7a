"""Who owns which KV page: free runs, reference counts and pins. Knows page ids only; the bytes live in `kv_cache`.

    [ free run | owned, 1 reference | shared: prefix tree + sequences, 2 or more references | free run | ... ]

Attention on a CPU is fastest over contiguous pages, so a sequence grows into the page right after its last one when that is
free, and a new sequence is placed so that its expected end meets the end of the largest free run: the room in between is left
for its growth, and the next newcomer finds the rest of that run in front of it. All operations are O(log runs) per run touched.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

from coordinator.errors import PagesExhausted


class PagePool:
    """`num_pages` pages, each free or referenced by one or more owners (sequences, the prefix tree, pins)."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_free = num_pages
        self._references = [0] * num_pages
        self._runs = _FreeRuns(num_pages)
        self._pins: dict[int, tuple[int, ...]] = {}
        self._last_generation = 0

    def allocate(self, count: int, *, after: int | None = None, expected: int = 0) -> list[int]:
        """`count` pages with one reference each, in token order.

        `after` is the sequence's last page, if it has one; `expected` says how many pages it may still take, these included.
        Raises PagesExhausted if fewer are free; then nothing was taken.
        """
        if count > self.num_free:
            raise PagesExhausted(count, self.num_free)
        pages: list[int] = []
        if count and after is not None:
            pages.extend(self._runs.take_at(after + 1, count))
        while len(pages) < count:
            pages.extend(self._runs.take_from_largest(count - len(pages), expected - len(pages)))
        for page in pages:
            self._references[page] = 1
        self.num_free -= count
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each; those without any are free at once."""
        freed = []
        for page in pages:
            assert self._references[page] > 0, f"page {page} released twice"
            self._references[page] -= 1
            if not self._references[page]:
                freed.append(page)
        self.num_free += len(freed)
        for start, end in _runs_of(sorted(freed)):
            self._runs.add(start, end)

    def references(self, page: int) -> int:
        return self._references[page]

    def pin(self, pages: Sequence[int]) -> int:
        """Keep these pages as they are. Returns the pin's generation: never 0, never given twice."""
        self.retain(pages)
        self._last_generation += 1
        self._pins[self._last_generation] = tuple(pages)
        return self._last_generation

    def unpin(self, generation: int) -> None:
        self.release(self._pins.pop(generation))

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    @property
    def pins(self) -> Iterator[tuple[int, ...]]:
        return iter(self._pins.values())

    def check_integrity(self, owners: Iterable[Iterable[int]]) -> None:
        """`owners` are all page lists that hold references, pins excepted: counts and free runs must follow from them."""
        counted = Counter(page for pages in (*owners, *self._pins.values()) for page in pages)
        for page, references in enumerate(self._references):
            assert references == counted[page], f"page {page}: {references} references, {counted[page]} owners"
        free = [page for page in range(self.num_pages) if not counted[page]]
        assert len(free) == self.num_free, f"{len(free)} pages without an owner, {self.num_free} counted as free"
        assert self._runs.runs() == list(_runs_of(free)), "free runs differ from the pages without an owner"


class _FreeRuns:
    """Disjoint free intervals [start, end), never adjacent to one another, found by start, by end or as the largest."""

    def __init__(self, num_pages: int) -> None:
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []  # heap of (-size, start); entries that no longer hold are skipped
        if num_pages:
            self.add(0, num_pages)

    def runs(self) -> list[tuple[int, int]]:
        return sorted(self._end_of.items())

    def add(self, start: int, end: int) -> None:
        """Give pages back, joined with free neighbours."""
        if start in self._start_of:
            start = self._remove(self._start_of[start])[0]
        if end in self._end_of:
            end = self._remove(end)[1]
        self._insert(start, end)

    def take_at(self, start: int, count: int) -> range:
        """At most `count` pages of the free run that begins at `start`; an empty range when none does."""
        if start not in self._end_of:
            return range(0)
        _, end = self._remove(start)
        cut = min(start + count, end)
        self._insert(cut, end)
        return range(start, cut)

    def take_from_largest(self, count: int, expected: int) -> range:
        start, end = self._largest()
        self._remove(start)
        first = max(start, end - max(count, expected))
        cut = min(first + count, end)
        self._insert(start, first)
        self._insert(cut, end)
        return range(first, cut)

    def _largest(self) -> tuple[int, int]:
        while True:
            size, start = self._by_size[0]
            if self._end_of.get(start) == start - size:
                return start, start - size
            heappop(self._by_size)

    def _insert(self, start: int, end: int) -> None:
        if start == end:
            return
        self._end_of[start] = end
        self._start_of[end] = start
        heappush(self._by_size, (start - end, start))
        if len(self._by_size) > 2 * len(self._end_of) + 64:
            self._by_size = [(s - e, s) for s, e in self._end_of.items()]
            heapify(self._by_size)

    def _remove(self, start: int) -> tuple[int, int]:
        end = self._end_of.pop(start)
        del self._start_of[end]
        return start, end


def _runs_of(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending page ids as maximal [start, end) runs."""
    start = previous = None
    for page in pages:
        if previous is None or page != previous + 1:
            if start is not None and previous is not None:
                yield start, previous + 1
            start = page
        previous = page
    if start is not None and previous is not None:
        yield start, previous + 1
