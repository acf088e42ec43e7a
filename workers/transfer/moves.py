"""What is asked of a way between two pools, and how a way answers. Every family of ways keeps to this, and to one contract suite.

    Link     one source rank's pool, read into ours        Move    pages of a hand-over that come from that rank
    open -> copy, copy, … -> close

A copy returns when its pages are here. It raises Unavailable when the other side is gone, slow or unwilling: then some of the target
pages may have been written, none will be any more, and the link is closed. LayoutMismatch and ValueError as `KVCache.copy_pages_from`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.kv_cache import HeadRun
from workers.transfer.plan import Part

TIMEOUT_S = 10.0     # a peer that is silent for this long in mid-copy is given up
SLOWEST_BYTES_S = 50e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The first `num_tokens` tokens in `src_pages` of the source rank go to `dst_pages` of ours; of each page these heads."""

    src_pages: Sequence[int]
    dst_pages: Sequence[int]
    num_tokens: int
    heads: HeadRun

    @classmethod
    def of(cls, part: Part, src_pages: Sequence[int], dst_pages: Sequence[int], num_tokens: int, page_size: int) -> "Move":
        """This part of a hand-over of `num_tokens` tokens. It may be empty."""
        positions = part.positions(-(-num_tokens // page_size))
        first, stop = positions.start, positions.stop
        return cls(src_pages=src_pages[first:stop], dst_pages=dst_pages[first:stop],
                   num_tokens=max(0, min(num_tokens, stop * page_size) - first * page_size),
                   heads=HeadRun(part.source_head, part.target_head, part.num_heads))


class Link(Protocol):
    """A way to one source rank's pool. Used by one thread at a time."""

    def copy(self, move: Move) -> None: ...

    def close(self) -> None: ...


def timeout_s(num_bytes: int) -> float:
    """How long a transfer of so much may take before its peer is given up."""
    return TIMEOUT_S + num_bytes / SLOWEST_BYTES_S
