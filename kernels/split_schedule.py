"""Divide the keys of all decoding sequences evenly over a fixed number of programs. Knows lengths; never queries or caches.

All sequences' keys, in units of `unit` tokens, stand on one line, and every program owns an equal span of it; so long sequences
are split and short ones share a program. A sequence that lies wholly in one span is finished there; the pieces of the others
are left as partial results, which `split_combine` adds up.

    sequence    0                 1       2            3
    line        |=================|=======|============|======|
    program     0       1       2       3       4       5

The number of programs is fixed and everything else is computed on the device from the lengths: a captured CUDA graph holds the
refill and follows the lengths as they grow. One refill serves all layers of a step. Source: FlashMLA's tile scheduler
(get_mla_metadata), with its loop over programs replaced by a closed form so that every program finds its own span.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT_TOKENS = 64

# What starting a sequence costs a program (its query, a cold pipeline, its result), in units of keys.
START_COST = 2


@dataclass(frozen=True, slots=True)
class SplitSchedule:
    """Where each program starts and ends, for up to max_seqs sequences. Programs without work have first > last.

    spans   [P, 4] int32    first sequence, first unit in it, last sequence, end unit in it; units of the sequences between: all
    owners  [max_seqs, 2] int32    first and last program of a sequence; unwritten where the length is 0

    A program leaves at most two partial results: slot 2p of a sequence that began in an earlier program, slot 2p + 1 of
    one that it begins and does not end.
    """

    spans: Tensor
    owners: Tensor
    unit: int

    @classmethod
    def allocate(cls, max_seqs: int, num_programs: int, device: torch.device, unit: int = UNIT_TOKENS) -> "SplitSchedule":
        """`num_programs` fill the device together with the kernel's grid over heads: see `num_splits` of the kernels."""
        spans = torch.zeros(num_programs, 4, dtype=torch.int32, device=device)
        spans[:, 2] = -1  # no work before the first refill
        return cls(spans, torch.zeros(max_seqs, 2, dtype=torch.int32, device=device), unit)

    @property
    def num_programs(self) -> int:
        return self.spans.shape[0]

    @property
    def num_partials(self) -> int:
        return 2 * self.num_programs

    def refill(self, seq_lens: Tensor, num_seqs: int) -> None:
        """seq_lens [>= num_seqs] int32, contiguous, 0 for padding rows. One launch, nothing is read back.

        Raises ValueError for more sequences than allocated.
        """
        if num_seqs > min(self.owners.shape[0], seq_lens.shape[0]):
            raise ValueError(f"{num_seqs} sequences; the schedule has room for {self.owners.shape[0]}, seq_lens holds {seq_lens.shape[0]}")
        _split_schedule_kernel[(self.num_programs,)](
            seq_lens, self.spans, self.owners, num_seqs,
            UNIT=self.unit, START_COST=START_COST, MAX_SEQS=max(16, triton.next_power_of_2(num_seqs)), num_warps=1,
        )


@triton.jit
def _split_schedule_kernel(seq_lens, spans, owners, num_seqs, UNIT: tl.constexpr, START_COST: tl.constexpr, MAX_SEQS: tl.constexpr):
    """Every program looks at all lengths and writes its own span, and `owners` of the sequences that begin or end in it."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    seqs = tl.arange(0, MAX_SEQS)
    units = tl.cdiv(tl.load(seq_lens + seqs, mask=seqs < num_seqs, other=0), UNIT)
    is_used = (units > 0).to(tl.int32)
    costs = units + START_COST * is_used
    starts = tl.cumsum(costs, 0) - costs
    span = tl.maximum(tl.cdiv(tl.sum(costs, 0), num_programs), 1)

    low = _snapped(program * span, starts, costs, span, START_COST)
    high = _snapped((program + 1) * span, starts, costs, span, START_COST)
    first_units = tl.minimum(tl.maximum(low - starts - START_COST, 0), units)
    end_units = tl.minimum(tl.maximum(high - starts - START_COST, 0), units)

    # Sequences of about equal length, of which nearly the same number falls to each program, are better left whole: no partial
    # results, at the price of a little imbalance.
    whole_per_program = tl.maximum(tl.cdiv(tl.sum(is_used, 0), num_programs), 1)
    is_kept_whole = whole_per_program * tl.max(costs, 0) <= span + span // 16 + 2 * START_COST
    is_mine = (tl.cumsum(is_used, 0) - is_used) // whole_per_program == program
    first_units = tl.where(is_kept_whole, 0, first_units)
    end_units = tl.where(is_kept_whole, tl.where(is_mine, units, 0), end_units)

    has_work = first_units < end_units
    first_seq = tl.min(tl.where(has_work, seqs, MAX_SEQS), 0)
    last_seq = tl.max(tl.where(has_work, seqs, -1), 0)
    tl.store(spans + program * 4, first_seq)
    tl.store(spans + program * 4 + 1, tl.sum(tl.where(seqs == first_seq, first_units, 0), 0))
    tl.store(spans + program * 4 + 2, last_seq)
    tl.store(spans + program * 4 + 3, tl.sum(tl.where(seqs == last_seq, end_units, 0), 0))
    program_of_seqs = tl.zeros_like(seqs) + program
    tl.store(owners + seqs * 2, program_of_seqs, mask=has_work & (first_units == 0))
    tl.store(owners + seqs * 2 + 1, program_of_seqs, mask=has_work & (end_units == units))


@triton.jit
def _snapped(cut, starts, costs, span, START_COST: tl.constexpr):
    """`cut` moved to the start or end of the sequence that it falls in, where that leaves no piece worth a start of its own."""
    slack = tl.minimum(START_COST, span // 4)
    is_here = (starts <= cut) & (cut < starts + costs)
    start = tl.sum(tl.where(is_here, starts, 0), 0)
    end = tl.sum(tl.where(is_here, starts + costs, 0), 0)
    is_in_sequence = end > 0
    near_start = is_in_sequence & (cut - start - START_COST <= slack)
    near_end = is_in_sequence & (end - cut <= slack)
    return tl.where(near_start, start, tl.where(near_end, end, cut))


@triton.jit
def program_span(spans, program):
    """First sequence, first unit, last sequence, end unit."""
    at = spans + program * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
