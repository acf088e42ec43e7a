"""Attention of one new token per sequence over paged keys and values with grouped heads. Knows layouts; never weights or rotation.

The heads of a group read the same keys. They are few, so tokens take the rows of both products:

    scores  S^T [tokens, heads] = K Q^T
    sums    O^T [d, heads] += V^T P^T
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_tile import LOG2_E, accumulate, store_result
from kernels.launch import dot_dtype, loop_bound, num_programs
from kernels.split_combine import allocate_partials, combine_splits
from kernels.split_schedule import SplitSchedule, program_span

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    block_n: int      # at most the page and the schedule's unit, to which it is lowered
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


CONFIGS = (  # (largest head dimension, config)
    (64, Config(block_n=64, num_warps=4, num_stages=4, programs_per_multiprocessor=3)),
    (128, Config(block_n=64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)),
    (MAX_HEAD_DIM, Config(block_n=64, num_warps=4, num_stages=2, programs_per_multiprocessor=1)),
)


def config_for(head_dim: int) -> Config:
    return next(config for largest, config in CONFIGS if head_dim <= largest)


def num_splits(num_kv_heads: int, head_dim: int, device: torch.device, config: Config | None = None) -> int:
    """Programs to schedule: with the programs over key/value heads they fill the device once."""
    config = config or config_for(head_dim)
    return max(1, num_programs(device, config.programs_per_multiprocessor) // num_kv_heads)


def gqa_decode(q: Tensor, cache: Tensor, page_table: Tensor, seq_lens: Tensor, schedule: SplitSchedule, scale: float, page_size: int,
               out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """softmax(scale * q . keys) . values, over each sequence's own tokens; H / KV query heads share a key/value head.

    q           [N, H, d], rotated; last dimension contiguous, d <= 256, H a multiple of KV
    cache       [2, num_slots, KV, d] contiguous: keys, values; slot = page * page_size + offset
    page_table  [N, max_pages] int32, last dimension contiguous; entries past a sequence's end are never read
    seq_lens    [N] int32, including the current token; 0 for padding rows
    schedule    refilled from seq_lens
    page_size   power of two >= 16
    out         [N, H, d], last dimension contiguous; None: a new tensor
    returns     out, in q's dtype; zeros for padding rows

    Sums are float32. Where a sequence is split depends on its batch mates, and so do its last bits; the same batch gives the
    same bits. Raises ValueError for other sizes. Source: GQA, arXiv 2305.13245; flash-decoding; FlashMLA's schedule.
    """
    num_heads, head_dim = q.shape[1:]
    num_slots, num_kv_heads = cache.shape[1:3]
    if page_size < 16 or page_size & (page_size - 1) or head_dim > MAX_HEAD_DIM or cache.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"gqa_decode: page size {page_size}, q {tuple(q.shape)}, cache {tuple(cache.shape)}")
    config = config or config_for(head_dim)
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    results, log_sums = allocate_partials(schedule, num_heads, head_dim, q.device)
    _gqa_decode_kernel[(num_kv_heads, schedule.num_programs)](
        q, cache, page_table, seq_lens, schedule.spans, out, results, log_sums, num_slots,
        q.stride(0), q.stride(1), page_table.stride(0), out.stride(0), out.stride(1), scale * LOG2_E,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, D=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_H=max(16, triton.next_power_of_2(group)), BLOCK_N=min(config.block_n, page_size, schedule.unit), PAGE_SIZE=page_size,
        UNIT=schedule.unit, DOT=dot_dtype(cache.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )
    combine_splits(results, log_sums, seq_lens, schedule, out)
    return out


def gqa_decode_reference(q: Tensor, cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, page_size: int) -> Tensor:
    """The same in plain torch and float32, sequence after sequence."""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for i, length in enumerate(seq_lens.tolist()):
        positions = torch.arange(length, device=q.device)
        slots = page_table[i, positions // page_size].long() * page_size + positions % page_size
        keys, values = (plane[slots].float().transpose(0, 1).repeat_interleave(q.shape[1] // cache.shape[2], 0) for plane in cache)
        out[i] = ((q[i].float().unsqueeze(1) @ keys.transpose(1, 2) * scale).softmax(-1) @ values).squeeze(1)
    return out


@triton.jit
def _gqa_decode_kernel(
    q, cache, page_table, seq_lens, spans, out, results, log_sums, num_slots,
    q_stride_n, q_stride_h, table_stride, out_stride_n, out_stride_h, scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):
    """One group of heads over one program's span of the schedule. `scale` is that of base-2 exponents.

    The groups of one span are neighbours, so that they run together: a token's keys of all heads lie next to each other.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    TOKEN: tl.constexpr = NUM_KV_HEADS * D
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    heads = kv_head * GROUP + tl.arange(0, BLOCK_H)
    is_head = tl.arange(0, BLOCK_H) < GROUP
    columns = tl.arange(0, BLOCK_D)
    is_column = columns < D
    tokens = tl.arange(0, BLOCK_N)
    values_at = num_slots.to(tl.int64) * TOKEN
    first_seq, first_unit, last_seq, end_unit = program_span(spans, program)
    for seq in range(loop_bound(first_seq), loop_bound(last_seq + 1)):
        length = tl.load(seq_lens + seq)
        begin = tl.where(seq == first_seq, first_unit * UNIT, 0)
        end = tl.where(seq == last_seq, tl.minimum(end_unit * UNIT, length), length)
        if begin < end:
            q_rows = q + seq * q_stride_n + heads[:, None] * q_stride_h + columns[None, :]
            queries = tl.load(q_rows, mask=is_head[:, None] & is_column[None, :], other=0.0)
            pages = page_table + seq * table_stride
            top = tl.full([BLOCK_H], float("-inf"), tl.float32)
            totals = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
            acc = tl.zeros([BLOCK_D, BLOCK_H], tl.float32)
            # A tile's page is looked up one tile early: a load inside of the loop that another load waits for would count as
            # a stage of the pipeline of its own.
            page = tl.load(pages + begin // PAGE_SIZE)
            for start in range(loop_bound(begin), loop_bound(end), BLOCK_N):
                slot = page.to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE
                page = tl.load(pages + tl.minimum(start + BLOCK_N, end - 1) // PAGE_SIZE)
                rows = cache + slot * TOKEN + kv_head * D + tokens[:, None] * TOKEN + columns[None, :]
                # Zeros past the end: what an unwritten slot holds times a weight of zero could still be NaN.
                is_real = (start + tokens < end)[:, None] & is_column[None, :]
                keys = tl.load(rows, mask=is_real, other=0.0)
                values = tl.load(rows + values_at, mask=is_real, other=0.0)
                scores = tl.dot(keys.to(DOT), tl.trans(queries).to(DOT))
                acc, top, totals = accumulate(scores, values, end - start, acc, top, totals, scale, 0, True, DOT)

            partial = program * 2 + (begin == 0).to(tl.int32)
            store_result(acc, top, tl.sum(totals, 0), heads, columns, is_head[None, :] & is_column[:, None], is_head,
                         out + seq * out_stride_n, out_stride_h, results, log_sums, partial, (begin == 0) & (end == length), NUM_HEADS, D)
