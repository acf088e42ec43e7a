"""Causal attention of new tokens over the paged keys and values of their sequences, which hold the new tokens' already.

Knows pages; never rotation or which tokens were cached before. One program takes BLOCK_M queries of one head through all keys they
see, page by page; programs with the longest way start first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import dot_dtype, loop_bound
from kernels.prefill_tile import LOG2_E, find_sequence, hold, num_tiles, packs_weights, release, softmax_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_n: at most; a tile never leaves its page. heads_per_group: heads whose programs run side by side."""

    block_m: int
    block_n: int
    heads_per_group: int
    num_warps: int
    num_stages: int


CONFIGS = {  # by the most new tokens of one sequence
    64: Config(block_m=64, block_n=64, heads_per_group=8, num_warps=4, num_stages=2),
    1 << 31: Config(block_m=128, block_n=64, heads_per_group=8, num_warps=8, num_stages=2),
}


def config_for(max_q: int) -> Config:
    return next(config for most, config in CONFIGS.items() if max_q <= most)


def gqa_prefill(q: Tensor, cache: Tensor, page_table: Tensor, cu_q: Tensor, seq_lens: Tensor, max_q: int, scale: float, page_size: int,
                out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """softmax(scale * q . k) . v; of Lq new tokens, the last of Lk, number i sees keys 0 ... Lk - Lq + i. H / KV heads share a key.

    q           [Tq, H, d], rotated; strided except for the last dimension; d a power of two, 16 to 256
    cache       [2, num_slots, KV, d] contiguous: keys, then values; slot = page * page_size + offset
    page_table  [B, max_pages] int32; entries past a sequence's end are never read, nor does what stands in slots past it matter
    cu_q        [B + 1] int32: sequence b's queries are rows cu_q[b] to cu_q[b + 1]; cu_q[0] = 0
    seq_lens    [B] int32, the new tokens included
    max_q       the most queries of one sequence: known to the host, chooses the config only
    scale       > 0
    page_size   power of two >= 16
    out         [Tq, H, d], strided except for the last dimension; None: a new tensor
    returns     out; rows past cu_q[B] are left as they are

    Sums are float32. A row's result depends on its own sequence alone. Raises ValueError for other shapes.
    Source: GQA, arXiv 2305.13245; FlashAttention-3, 3.2 for the order of work.
    """
    num_queries, num_heads, head_dim = q.shape
    _, num_slots, num_kv_heads, _ = cache.shape
    if any(size < 16 or size & (size - 1) for size in (head_dim, page_size)) or head_dim > 256 or cache.shape[3] != head_dim \
            or num_heads % num_kv_heads or not cache.is_contiguous() or q.stride(2) != 1 or scale <= 0 \
            or cu_q.shape[0] != seq_lens.shape[0] + 1 or page_table.shape[0] != seq_lens.shape[0]:
        raise ValueError(f"gqa_prefill: q {tuple(q.shape)}, cache {tuple(cache.shape)}, page_table {tuple(page_table.shape)}, "
                         f"cu_q {tuple(cu_q.shape)}, seq_lens {tuple(seq_lens.shape)}, page size {page_size}, scale {scale}")
    if out is None:
        out = torch.empty(num_queries, num_heads, head_dim, dtype=q.dtype, device=q.device)
    num_seqs = seq_lens.shape[0]
    if num_queries == 0 or num_seqs == 0:
        return out
    config = config or config_for(max_q)
    block_n = min(config.block_n, page_size)
    heads = next(count for count in range(min(config.heads_per_group, num_heads), 0, -1) if num_heads % count == 0)
    rows = cache.view(2 * num_slots, -1)
    tiles = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [block_n, head_dim])
    _gqa_prefill_kernel[(num_tiles(num_queries, num_seqs, config.block_m) * heads, num_heads // heads)](
        q, cache, out, page_table, cu_q, seq_lens, tiles, num_seqs, num_slots, q.stride(0), q.stride(1), rows.stride(0),
        page_table.stride(0), out.stride(0), out.stride(1), scale * LOG2_E,
        D=head_dim, PER_KV_HEAD=num_heads // num_kv_heads, HEADS=heads, PAGE_SIZE=page_size, BLOCK_M=config.block_m, BLOCK_N=block_n,
        PACK=packs_weights(cache.dtype), DOT=dot_dtype(cache.dtype), num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def gqa_prefill_reference(q: Tensor, cache: Tensor, page_table: Tensor, cu_q: Tensor, seq_lens: Tensor, scale: float,
                          page_size: int) -> Tensor:
    """As gqa_prefill, sequence by sequence, in float32."""
    out = torch.zeros(q.shape, device=q.device)
    bounds = cu_q.tolist()
    for seq, (start, end, length) in enumerate(zip(bounds, bounds[1:], seq_lens.tolist(), strict=False)):
        token = torch.arange(length, device=q.device)
        slots = page_table[seq].long()[token // page_size] * page_size + token % page_size
        keys, values = cache[:, slots].float().repeat_interleave(q.shape[1] // cache.shape[2], 2)
        scores = torch.einsum("qhd,khd->hqk", q[start:end].float(), keys) * scale
        is_future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(length - (end - start) + 1)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill_(is_future, float("-inf")).softmax(-1), values)
    return out


@triton.jit(do_not_specialize=["num_seqs"])
def _gqa_prefill_kernel(q, cache, out, page_table, cu_q, seq_lens, tiles, num_seqs, num_slots, q_stride, q_head_stride, slot_stride,
                        table_stride, out_stride, out_head_stride, scale, D: tl.constexpr, PER_KV_HEAD: tl.constexpr,
                        HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        PACK: tl.constexpr, DOT: tl.constexpr):
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS  # last tiles first: they see the most keys
    head = tl.program_id(1) * HEADS + tl.program_id(0) % HEADS
    seq = find_sequence(cu_q, tile, num_seqs, BLOCK_M)
    q_start, q_end = tl.load(cu_q + seq), tl.load(cu_q + seq + 1)
    num_keys = tl.load(seq_lens + seq)
    num_queries = q_end - q_start
    first = (tile - q_start // BLOCK_M - seq) * BLOCK_M
    if first >= num_queries:
        return

    row, column = tl.arange(0, BLOCK_M), tl.arange(0, D)[None, :]
    is_query = (first + row < num_queries)[:, None]
    q += (q_start + first).to(tl.int64) * q_stride + head * q_head_stride
    queries = tl.load(q + row[:, None] * q_stride + column, mask=is_query, other=0.0).to(DOT)

    key = tl.arange(0, BLOCK_N)
    first_limit = num_keys - num_queries + first     # last key that query `first` sees
    end = tl.minimum(first_limit + BLOCK_M, num_keys)  # all keys that any query here sees
    num_blocks = tl.cdiv(end, BLOCK_N)
    kv_column = head // PER_KV_HEAD * D
    pages = page_table + seq.to(tl.int64) * table_stride

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    correction = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    held = hold(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), cache.dtype.element_ty, PACK)
    slot = tl.load(pages) * PAGE_SIZE
    slot_before = slot
    zero = tl.program_id(2)  # an operation: the compiler's pipeliner mistakes one carried value that is another one of the turn before
    bound = num_blocks * BLOCK_N
    tl.assume(bound > 0)
    for start in tl.range(0, loop_bound(bound), BLOCK_N):
        scores = tl.dot(queries, tiles.load([slot, kv_column]).to(DOT).T)
        # The block before, whose keys are all the sequence's own. In the first turn there is none: zeros times any values.
        values = tiles.load([num_slots + slot_before, kv_column]).to(DOT)
        acc = tl.dot(release(held, cache.dtype.element_ty, PACK).to(DOT), values, acc * correction[:, None])
        slot_before = slot + zero
        following = tl.minimum(start + BLOCK_N, num_keys - 1)  # its page is looked up a turn ahead
        slot = tl.load(pages + following // PAGE_SIZE) * PAGE_SIZE + (start + BLOCK_N) % PAGE_SIZE
        if start + BLOCK_N > first_limit + 1:
            scores = tl.where(key[None, :] <= (first_limit - start + row)[:, None], scores, float("-inf"))
        weights, best, total, correction = softmax_step(scores, best, total, scale)
        held = hold(weights, cache.dtype.element_ty, PACK)

    # Past the sequence's end stands whatever: a NaN there must not meet even a weight of zero, neither now nor in the first turn.
    start = (num_blocks - 1) * BLOCK_N
    cache += (num_slots + slot_before).to(tl.int64) * slot_stride + kv_column
    values = tl.load(cache + key[:, None] * slot_stride + column, mask=(start + key < end)[:, None], other=0.0).to(DOT)
    acc = tl.where(num_blocks > 1, acc, 0.0)
    acc = tl.dot(release(held, cache.dtype.element_ty, PACK).to(DOT), values, acc * correction[:, None])
    out += (q_start + first).to(tl.int64) * out_stride + head * out_head_stride
    tl.store(out + row[:, None] * out_stride + column, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_query)
