"""Which rank of a source sends what to which rank of a target, when their KV pools are split differently. Pure numbers, no tensor.

    gqa   heads are split over ranks; with fewer heads than ranks, neighbours hold the same head
              8 heads  tp 2  [0 1 2 3][4 5 6 7]      tp 4  [0 1][2 3][4 5][6 7]      tp 16  [0][0][1][1] … [7][7]
    mla   one latent for all heads, whole on every rank: a single head that all ranks hold

Ranks that hold the same head share the work: each sends its part of the pages.
"""

from dataclasses import dataclass

from coordinator.errors import LayoutMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source rank's share of what one target rank needs. Heads are counted within each rank's own pool."""

    source_rank: int
    source_head: int   # first of `num_heads`
    target_head: int
    num_heads: int
    share: int         # the pages are cut into `num_shares` equal runs, in token order; this is the number of one
    num_shares: int

    def positions(self, num_pages: int) -> range:
        """Positions in the list of pages that this part moves."""
        return range(num_pages * self.share // self.num_shares, num_pages * (self.share + 1) // self.num_shares)


def heads_of(num_heads: int, tp_size: int, rank: int) -> range:
    """The model's heads in the pool of this rank. Raises LayoutMismatch if they neither split nor repeat evenly."""
    if num_heads % tp_size and tp_size % num_heads:
        raise LayoutMismatch("tp_size", f"one that {num_heads} KV heads split over or repeat on", tp_size)
    first = rank * num_heads // tp_size
    return range(first, first + max(num_heads // tp_size, 1))


def plan(num_heads: int, source_tp: int, target_tp: int, target_rank: int) -> tuple[Part, ...]:
    """Everything that `target_rank` has to fetch, each head of each page once. Raises LayoutMismatch as `heads_of` does."""
    wanted = heads_of(num_heads, target_tp, target_rank)
    runs = [range(max(held.start, wanted.start), min(held.stop, wanted.stop))
            for held in (heads_of(num_heads, source_tp, rank) for rank in range(source_tp))]
    parts = []
    for rank, run in enumerate(runs):
        if not run:
            continue
        holders = [other for other, same in enumerate(runs) if same == run]
        parts.append(Part(source_rank=rank, source_head=run.start - heads_of(num_heads, source_tp, rank).start,
                          target_head=run.start - wanted.start, num_heads=len(run), share=holders.index(rank), num_shares=len(holders)))
    return tuple(parts)
