"""Attention of one new token per sequence over a paged cache of latents (absorbed MLA). Knows layouts; never weights or rotation.

A tile of latents is read once and serves all heads of a program, as keys and (its first R columns) as values. Everything that
reads a tile does so from shared memory, as an operand of the matrix unit:

    scores  S [heads, tokens] = Q K^T, or S^T = K Q^T with few heads, which would leave the unit's 64 rows empty
    sums    O^T [R, heads] += V^T P^T, so that the unit's rows are always full
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.decode_tile import LOG2_E, accumulate, store_result
from kernels.launch import OVERLAPS, dot_dtype, loop_bound, num_programs, wait_for_earlier
from kernels.split_combine import allocate_partials, combine_splits
from kernels.split_schedule import SplitSchedule, program_span


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    block_h: int
    block_n: int           # at most the page and the schedule's unit, to which it is lowered
    tokens_as_rows: bool   # of the scores
    use_tma: bool          # whole tiles come by the bulk copy engine, what remains of a sequence by ordinary loads
    num_warps: int
    num_stages: int        # one less is how many tiles are on their way
    programs_per_multiprocessor: int = 1


CONFIGS = (  # (most heads, config)
    (16, Config(block_h=16, block_n=64, tokens_as_rows=True, use_tma=True, num_warps=4, num_stages=2)),
    (32, Config(block_h=32, block_n=64, tokens_as_rows=True, use_tma=True, num_warps=4, num_stages=2)),
    (128, Config(block_h=64, block_n=64, tokens_as_rows=False, use_tma=True, num_warps=8, num_stages=3)),
)


def config_for(num_heads: int) -> Config:
    return next((config for most, config in CONFIGS if num_heads <= most), CONFIGS[-1][1])


def num_splits(num_heads: int, device: torch.device, config: Config | None = None) -> int:
    """Programs to schedule: with the programs over heads they fill the device once."""
    config = config or config_for(num_heads)
    head_blocks = -(-num_heads // config.block_h)
    return max(1, num_programs(device, config.programs_per_multiprocessor) // head_blocks)


def mla_decode(q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, seq_lens: Tensor, schedule: SplitSchedule,
               scale: float, page_size: int, out: Tensor | None = None, config: Config | None = None, *,
               is_settled: bool = False) -> Tensor:
    """softmax(scale * (q_latent . latent + q_rope . rotated)) . latent, over each sequence's own tokens.

    q_latent    [N, H, R]    W_UK absorbed; last dimension contiguous, R and rope powers of two >= 16
    q_rope      [N, H, rope] rotated, last dimension contiguous
    cache       [num_slots, R + rope] contiguous, latent first; slot = page * page_size + offset
    page_table  [N, max_pages] int32, last dimension contiguous; entries past a sequence's end are never read
    seq_lens    [N] int32, including the current token; 0 for padding rows
    schedule    refilled from seq_lens
    page_size   power of two >= 16
    out         [N, H, R], last dimension contiguous; None: a new tensor
    is_settled  the schedule, what it was made from, the page table and the cache were written before the last launch: then programs
                look up where they begin while the one before still runs
    returns     out, in q's dtype, before W_UV; zeros for padding rows

    Sums are float32. Where a sequence is split depends on its batch mates, and so do its last bits; the same batch gives the
    same bits. Raises ValueError for other sizes. Source: DeepSeek-V2 paper, 2.1.2; FlashMLA; flash-decoding.
    """
    out, results, log_sums = mla_decode_parts(q_latent, q_rope, cache, page_table, seq_lens, schedule, scale, page_size, out, config,
                                              is_settled=is_settled)
    combine_splits(results, log_sums, seq_lens, schedule, out)
    return out


def mla_decode_parts(q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, seq_lens: Tensor, schedule: SplitSchedule,
                     scale: float, page_size: int, out: Tensor | None = None, config: Config | None = None, *,
                     is_settled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`mla_decode` but for its end: `out` with the rows of sequences that one program finished, and the parts of the others as
    `split_combine` and `combined_product` take them."""
    num_heads, latent_dim = q_latent.shape[1:]
    rope_dim = q_rope.shape[2]
    if any(size < 16 or size & (size - 1) for size in (page_size, latent_dim, rope_dim)) or cache.shape[1] != latent_dim + rope_dim:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q_latent, q_rope, cache))
        raise ValueError(f"mla_decode: page size {page_size}; q_latent, q_rope, cache {shapes}")
    config = config or config_for(num_heads)
    block_n = min(config.block_n, page_size, schedule.unit)
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device) if out is None else out
    results, log_sums = allocate_partials(schedule, num_heads, latent_dim, q_latent.device)
    latents, rotated = cache, cache
    if config.use_tma:
        strides = [cache.shape[1], 1]
        latents = TensorDescriptor(cache, [cache.shape[0], latent_dim], strides, [block_n, latent_dim])
        rotated = TensorDescriptor(cache[:, latent_dim:], [cache.shape[0], rope_dim], strides, [block_n, rope_dim])
    _mla_decode_kernel[(triton.cdiv(num_heads, config.block_h), schedule.num_programs)](
        q_latent, q_rope, cache, latents, rotated, page_table, seq_lens, schedule.spans, out, results, log_sums,
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), page_table.stride(0), out.stride(0), out.stride(1),
        scale * LOG2_E,
        NUM_HEADS=num_heads, R=latent_dim, ROPE=rope_dim, BLOCK_H=config.block_h, BLOCK_N=block_n, PAGE_SIZE=page_size,
        UNIT=schedule.unit, TOKENS_AXIS=0 if config.tokens_as_rows else 1, USE_TMA=config.use_tma,
        LOOKS_UP=is_settled and OVERLAPS, DOT=dot_dtype(cache.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=OVERLAPS,
    )
    return out, results, log_sums


def mla_decode_reference(q_latent: Tensor, q_rope: Tensor, cache: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float,
                         page_size: int) -> Tensor:
    """The same in plain torch and float32, sequence after sequence."""
    q = torch.cat((q_latent, q_rope), -1).float()
    out = torch.zeros(q_latent.shape, dtype=torch.float32, device=q.device)
    for i, length in enumerate(seq_lens.tolist()):
        positions = torch.arange(length, device=q.device)
        latents = cache[page_table[i, positions // page_size].long() * page_size + positions % page_size].float()
        out[i] = (q[i] @ latents.T * scale).softmax(-1) @ latents[:, : q_latent.shape[2]]
    return out


@triton.jit
def _mla_decode_kernel(
    q_latent, q_rope, cache, latents, rotated, page_table, seq_lens, spans, out, results, log_sums,
    q_latent_stride_n, q_latent_stride_h, q_rope_stride_n, q_rope_stride_h, table_stride, out_stride_n, out_stride_h,
    scale,
    NUM_HEADS: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr, TOKENS_AXIS: tl.constexpr, USE_TMA: tl.constexpr,
    LOOKS_UP: tl.constexpr, DOT: tl.constexpr,
):
    """One block of heads over one program's span of the schedule. `scale` is that of base-2 exponents.

    The blocks of heads of one span are neighbours, so that they run together and share its tiles in the L2 cache.
    """
    program = tl.program_id(1)
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < NUM_HEADS
    columns = tl.arange(0, R)
    rope_columns = tl.arange(0, ROPE)
    if LOOKS_UP:
        _fetch_first_tile(cache, page_table, seq_lens, spans, program, table_stride, R + ROPE, BLOCK_N, PAGE_SIZE, UNIT)
    wait_for_earlier()
    first_seq, first_unit, last_seq, end_unit = program_span(spans, program)
    for seq in range(loop_bound(first_seq), loop_bound(last_seq + 1)):
        length = tl.load(seq_lens + seq)
        begin = tl.where(seq == first_seq, first_unit * UNIT, 0)
        end = tl.where(seq == last_seq, tl.minimum(end_unit * UNIT, length), length)
        if begin < end:
            q_row = q_latent + seq * q_latent_stride_n
            q_c = tl.load(q_row + heads[:, None] * q_latent_stride_h + columns[None, :], mask=is_head[:, None], other=0.0)
            q_row = q_rope + seq * q_rope_stride_n
            q_r = tl.load(q_row + heads[:, None] * q_rope_stride_h + rope_columns[None, :], mask=is_head[:, None], other=0.0)
            pages = page_table + seq * table_stride

            top = tl.full([BLOCK_H], float("-inf"), tl.float32)
            totals = tl.zeros([BLOCK_N, BLOCK_H] if TOKENS_AXIS == 0 else [BLOCK_H, BLOCK_N], tl.float32)
            acc = tl.zeros([R, BLOCK_H], tl.float32)
            # A tile's page is looked up one tile early: a load inside of the loop that another load waits for would count as
            # a stage of the pipeline of its own.
            page = tl.load(pages + begin // PAGE_SIZE)
            whole_end = begin
            if USE_TMA:
                whole_end = end // BLOCK_N * BLOCK_N
                for start in range(loop_bound(begin), loop_bound(whole_end), BLOCK_N):
                    slot = page * PAGE_SIZE + start % PAGE_SIZE
                    page = tl.load(pages + tl.minimum(start + BLOCK_N, end - 1) // PAGE_SIZE)
                    kv_c = latents.load([slot, 0])
                    kv_r = rotated.load([slot, 0])
                    acc, top, totals = _attend(q_c, q_r, kv_c, kv_r, slot, end - start, acc, top, totals, scale, TOKENS_AXIS, False, DOT)
            for start in range(loop_bound(whole_end), loop_bound(end), BLOCK_N):
                slot = page * PAGE_SIZE + start % PAGE_SIZE
                page = tl.load(pages + tl.minimum(start + BLOCK_N, end - 1) // PAGE_SIZE)
                kv_c, kv_r = _load_tile(cache, slot, end - start, R, ROPE, BLOCK_N)
                acc, top, totals = _attend(q_c, q_r, kv_c, kv_r, slot, end - start, acc, top, totals, scale, TOKENS_AXIS, True, DOT)

            partial = program * 2 + (begin == 0).to(tl.int32)
            store_result(acc, top, tl.sum(totals, TOKENS_AXIS), heads, columns, is_head[None, :], is_head, out + seq * out_stride_n,
                         out_stride_h, results, log_sums, partial, (begin == 0) & (end == length), NUM_HEADS, R)


@triton.jit
def _fetch_first_tile(cache, page_table, seq_lens, spans, program, table_stride, ROW: tl.constexpr, BLOCK_N: tl.constexpr,
                      PAGE_SIZE: tl.constexpr, UNIT: tl.constexpr):
    """Ask for the tile that the program begins with, a cache line of 64 numbers at a time; nothing waits for it."""
    LINES: tl.constexpr = BLOCK_N * ROW // 64
    seq, unit, last_seq, _ = program_span(spans, program)
    if seq <= last_seq:
        begin = unit * UNIT
        if begin < tl.load(seq_lens + seq):
            slot = tl.load(page_table + seq * table_stride + begin // PAGE_SIZE) * PAGE_SIZE + begin % PAGE_SIZE
            line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
            lines = cache + slot.to(tl.int64) * ROW + line * 64
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_tile(cache, slot, num_tokens, R: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows past `num_tokens` are zeros: what an unwritten slot holds times a weight of zero could still be NaN."""
    tokens = tl.arange(0, BLOCK_N)
    rows = cache + slot.to(tl.int64) * (R + ROPE) + tokens[:, None] * (R + ROPE)
    is_token = tokens[:, None] < num_tokens
    kv_c = tl.load(rows + tl.arange(0, R)[None, :], mask=is_token, other=0.0)
    kv_r = tl.load(rows + R + tl.arange(0, ROPE)[None, :], mask=is_token, other=0.0)
    return kv_c, kv_r


@triton.jit
def _attend(q_c, q_r, kv_c, kv_r, slot, num_tokens, acc, top, totals, scale,
            TOKENS_AXIS: tl.constexpr, IS_MASKED: tl.constexpr, DOT: tl.constexpr):
    """One step of the online softmax: new sums [R, heads], maxima [heads] and weights added up tile over tile.

    The conditions always hold: they are there for the compiler (Triton 3.6), whose pipeline of loads they shape.
    """
    if TOKENS_AXIS == 0:
        # What stands in a branch at the end comes after the loads of the next tile: they start as soon as there are scores.
        scores = tl.dot(kv_c.to(DOT), tl.trans(q_c).to(DOT))
        scores = tl.dot(kv_r.to(DOT), tl.trans(q_r).to(DOT), scores)
        if num_tokens > 0:
            acc, top, totals = accumulate(scores, kv_c, num_tokens, acc, top, totals, scale, TOKENS_AXIS, IS_MASKED, DOT)
    else:
        # Of products that feed each other, the first gets whole rows per warp, which with 8 warps and 64 rows means that it is
        # computed twice; and a tile that they read directly gets a third buffer, which does not fit. Not so across branches.
        if num_tokens > 0:
            scores = tl.dot(q_c.to(DOT), tl.trans(kv_c).to(DOT))
        else:
            scores = tl.zeros_like(totals)
        if slot >= 0:
            scores = tl.dot(q_r.to(DOT), tl.trans(kv_r).to(DOT), scores)
        else:
            scores = tl.dot(q_r.to(DOT), tl.trans(kv_r).to(DOT))
        acc, top, totals = accumulate(scores, kv_c, num_tokens, acc, top, totals, scale, TOKENS_AXIS, IS_MASKED, DOT)
    return acc, top, totals
