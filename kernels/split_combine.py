"""Add up the partial results of sequences that a split schedule divided. Knows softmax weights; never keys or queries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, loop_bound, wait_for_earlier
from kernels.split_schedule import SplitSchedule

MANY_PROGRAMS = 2048  # above it a program serves 8 heads, as most sequences of a large batch are whole and it has nothing to do


def allocate_partials(schedule: SplitSchedule, num_heads: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial results [num_partials, H, value_dim] and the base-2 logarithms of their softmax sums [num_partials, H], float32."""
    results = torch.empty(schedule.num_partials, num_heads, value_dim, dtype=torch.float32, device=device)
    return results, torch.empty(schedule.num_partials, num_heads, dtype=torch.float32, device=device)


def combine_splits(results: Tensor, log_sums: Tensor, seq_lens: Tensor, schedule: SplitSchedule, out: Tensor) -> None:
    """Write the rows of out [N, H, value_dim] (last dimension contiguous) that were split, and zeros where the length is 0.

    results, log_sums  as of allocate_partials; only slots that the schedule names are read
    seq_lens           [N] int32

    Partial results are added in the order of their keys, so the same splits give the same bits.
    """
    num_seqs, num_heads, value_dim = out.shape
    heads_per_program = 1 if num_seqs * num_heads <= MANY_PROGRAMS or num_heads % 8 else 8
    _combine_kernel[(num_heads // heads_per_program, num_seqs)](
        results, log_sums, seq_lens, schedule.owners, out, out.stride(0), out.stride(1),
        NUM_HEADS=num_heads, VALUE_DIM=value_dim, VALUE_BLOCK=triton.next_power_of_2(value_dim), HEADS_PER_PROGRAM=heads_per_program,
        PARTS_BLOCK=8, num_warps=4, launch_pdl=OVERLAPS,
    )


@triton.jit
def _combine_kernel(results, log_sums, seq_lens, owners, out, out_stride_n, out_stride_h,
                    NUM_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
                    PARTS_BLOCK: tl.constexpr):
    seq = tl.program_id(1)
    length = tl.load(seq_lens + seq)
    first = tl.load(owners + seq * 2)
    last = tl.load(owners + seq * 2 + 1)
    wait_for_earlier()
    values = tl.arange(0, VALUE_BLOCK)
    is_value = values < VALUE_DIM
    for i in range(HEADS_PER_PROGRAM):
        head = tl.program_id(0) * HEADS_PER_PROGRAM + i
        out_row = out + seq * out_stride_n + head * out_stride_h
        if length == 0:
            tl.store(out_row + values, tl.zeros([VALUE_BLOCK], out.dtype.element_ty), mask=is_value)
        elif first != last:
            row = combined_row(results, log_sums, first, last, head, values, is_value, NUM_HEADS, VALUE_DIM, VALUE_BLOCK, PARTS_BLOCK)
            tl.store(out_row + values, row.to(out.dtype.element_ty), mask=is_value)


@triton.jit
def combined_row(results, log_sums, first, last, head, values, is_value, NUM_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
                 VALUE_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """One head of a sequence that programs `first` to `last` share, [VALUE_BLOCK] float32."""
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([VALUE_BLOCK], tl.float32)
    for start in range(loop_bound(first), loop_bound(last + 1), PARTS_BLOCK):
        programs = start + tl.arange(0, PARTS_BLOCK)
        is_part = programs <= last
        slots = programs * 2 + (programs == first).to(tl.int32)
        rows = slots * NUM_HEADS + head
        log_sum = tl.load(log_sums + rows, mask=is_part, other=float("-inf"))
        part = tl.load(results + rows[:, None] * VALUE_DIM + values[None, :], mask=is_part[:, None] & is_value[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        weights = tl.exp2(log_sum - new_top)
        rescale = tl.exp2(top - new_top)
        acc = acc * rescale + tl.sum(part * weights[:, None], 0)
        total = total * rescale + tl.sum(weights, 0)
        top = new_top
    return acc / total
