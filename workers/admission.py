"""Whether the pool suffices at every moment to come. Pure arithmetic on counts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEVER = 1 << 40  # an end in no number of steps that anybody runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One admitted sequence as it will go on."""

    end: int         # in how many steps it will have ended, at the latest; NEVER if that is not known
    num_tokens: int  # that it has now
    num_pages: int   # that it holds now
    growth: int      # pages that it will still take at most
    own_pages: int   # of those it holds, what its end sets free: nobody else uses them


def fits(projections: Sequence[Projection], *, num_held: int, num_pages: int, page_size: int) -> bool:
    """`num_held` of the pool's `num_pages` are in use now, by these sequences and others that keep them (pins).

    Looked at just before each sequence's end: those that run on have grown by one token a step, those that ended before it have
    given back what only they used. Ends are taken late and growth early, so the answer errs on the safe side.
    """
    if num_held + sum(p.growth for p in projections) <= num_pages:
        return True
    end, num_tokens, pages, growth, own = np.array([(p.end, p.num_tokens, p.num_pages, p.growth, p.own_pages) for p in projections]).T
    moments = np.unique(end)[:, None]
    is_there = end >= moments  # [moments, sequences]
    grown = np.minimum(growth, -(-(num_tokens + moments) // page_size) - pages)
    held = num_held + np.where(is_there, grown, -own).sum(axis=1)
    return bool(held.max() <= num_pages)
