"""Causal attention of new tokens over decompressed keys and values (MLA), sequences of any lengths side by side.

Knows keys and values per head and the rotated key that all heads share, which is never copied to them: a score is the sum of two
products. One program takes BLOCK_M queries of one head through all keys they see; programs with the longest way start first.
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
    """heads_per_group: heads whose programs run side by side; fewer keep more of their keys and values in the L2 cache."""

    block_m: int
    block_n: int
    heads_per_group: int
    num_warps: int
    num_stages: int


CONFIGS = {  # by the most new tokens of one sequence
    2048: Config(block_m=64, block_n=64, heads_per_group=16, num_warps=4, num_stages=2),
    1 << 31: Config(block_m=128, block_n=128, heads_per_group=8, num_warps=8, num_stages=2),
}


def config_for(max_q: int) -> Config:
    return next(config for most, config in CONFIGS.items() if max_q <= most)


def mla_prefill(q: Tensor, kv: Tensor, k_rope: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, scale: float, out: Tensor | None = None,
                config: Config | None = None) -> Tensor:
    """softmax(scale * q . [k_nope | k_rope]) . v; of Lq new tokens after Lk - Lq cached ones, number i sees keys 0 ... Lk - Lq + i.

    q        [Tq, H, nope + rope], rotated; strided except for the last dimension; nope, rope and v are powers of two >= 16
    kv       [Tk, H, nope + v] contiguous: k_nope, then v
    k_rope   [Tk, rope], rotated; rows may be strided, by a multiple of 16 bytes
    cu_q     [B + 1] int32: sequence b's queries are rows cu_q[b] to cu_q[b + 1]; cu_q[0] = 0
    cu_k     [B + 1] int32: the same for its keys, at least as many
    max_q    the most queries of one sequence: known to the host, chooses the config only
    scale    > 0
    out      [Tq, H, v], strided except for the last dimension; None: a new tensor
    returns  out; rows past cu_q[B] are left as they are

    Sums are float32. A row's result depends on its own sequence alone. Raises ValueError for other shapes.
    Source: DeepSeek-V2 paper, 2.1; FlashAttention-3, 3.2 for the order of work.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, rope = k_rope.shape
    nope = head_dim - rope
    v_dim = kv.shape[2] - nope
    if any(dim < 16 or dim & (dim - 1) for dim in (nope, rope, v_dim)) or kv.shape[:2] != (num_keys, num_heads) or scale <= 0 \
            or not kv.is_contiguous() or q.stride(2) != 1 or k_rope.stride(1) != 1 or cu_q.shape != cu_k.shape:
        raise ValueError(f"mla_prefill: q {tuple(q.shape)}, kv {tuple(kv.shape)}, k_rope {tuple(k_rope.shape)}, "
                         f"cu_q {tuple(cu_q.shape)}, cu_k {tuple(cu_k.shape)}, scale {scale}")
    if out is None:
        out = torch.empty(num_queries, num_heads, v_dim, dtype=q.dtype, device=q.device)
    num_seqs = cu_q.shape[0] - 1
    if num_queries == 0 or num_seqs == 0:
        return out
    config = config or config_for(max_q)
    heads = next(count for count in range(min(config.heads_per_group, num_heads), 0, -1) if num_heads % count == 0)
    rows = kv.view(num_keys, -1)
    _mla_prefill_kernel[(num_tiles(num_queries, num_seqs, config.block_m) * heads, num_heads // heads)](
        q, kv, out, cu_q, cu_k, _rows_of(rows, config.block_n, nope), _rows_of(k_rope, config.block_n, rope),
        _rows_of(rows, config.block_n, v_dim), num_seqs, q.stride(0), q.stride(1), rows.stride(0), out.stride(0), out.stride(1),
        scale * LOG2_E, NOPE=nope, ROPE=rope, V=v_dim, HEADS=heads, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PACK=packs_weights(kv.dtype), DOT=dot_dtype(kv.dtype), num_warps=config.num_warps, num_stages=config.num_stages)
    return out


def mla_prefill_reference(q: Tensor, kv: Tensor, k_rope: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float) -> Tensor:
    """As mla_prefill, sequence by sequence, in float32."""
    nope = q.shape[2] - k_rope.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], kv.shape[2] - nope, device=q.device)
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for q_start, q_end, k_start, k_end in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        queries, keys = q[q_start:q_end].float(), kv[k_start:k_end, :, :nope].float()
        scores = torch.einsum("qhd,khd->hqk", queries[..., :nope], keys)
        scores += torch.einsum("qhd,kd->hqk", queries[..., nope:], k_rope[k_start:k_end].float())
        is_future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(k_end - k_start - (q_end - q_start) + 1)
        weights = (scores * scale).masked_fill_(is_future, float("-inf")).softmax(-1)
        out[q_start:q_end] = torch.einsum("hqk,khd->qhd", weights, kv[k_start:k_end, :, nope:].float())
    return out


def _rows_of(matrix: Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    """Tiles of a matrix for the bulk copy engine. It gives zeros for rows past the last."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [num_rows, num_columns])


@triton.jit(do_not_specialize=["num_seqs"])
def _mla_prefill_kernel(q, kv, out, cu_q, cu_k, nope_tiles, rope_tiles, v_tiles, num_seqs, q_stride, q_head_stride, kv_stride, out_stride,
                        out_head_stride, scale, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr, DOT: tl.constexpr):
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // HEADS  # last tiles first: they see the most keys
    head = tl.program_id(1) * HEADS + tl.program_id(0) % HEADS
    seq = find_sequence(cu_q, tile, num_seqs, BLOCK_M)
    q_start, q_end = tl.load(cu_q + seq), tl.load(cu_q + seq + 1)
    k_start, k_end = tl.load(cu_k + seq), tl.load(cu_k + seq + 1)
    num_queries = q_end - q_start
    first = (tile - q_start // BLOCK_M - seq) * BLOCK_M
    if first >= num_queries:
        return

    row = tl.arange(0, BLOCK_M)
    is_query = (first + row < num_queries)[:, None]
    q += (q_start + first).to(tl.int64) * q_stride + head * q_head_stride + row[:, None] * q_stride
    q_nope = tl.load(q + tl.arange(0, NOPE)[None, :], mask=is_query, other=0.0).to(DOT)
    q_rope = tl.load(q + NOPE + tl.arange(0, ROPE)[None, :], mask=is_query, other=0.0).to(DOT)

    key = tl.arange(0, BLOCK_N)
    first_limit = (k_end - k_start) - num_queries + first     # last key that query `first` sees
    end = tl.minimum(first_limit + BLOCK_M, k_end - k_start)  # all keys that any query here sees
    num_blocks = tl.cdiv(end, BLOCK_N)
    column = head * (NOPE + V)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    correction = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, V], tl.float32)
    held = hold(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), kv.dtype.element_ty, PACK)
    bound = num_blocks * BLOCK_N
    tl.assume(bound > 0)
    for start in tl.range(0, loop_bound(bound), BLOCK_N):
        k_nope = nope_tiles.load([k_start + start, column]).to(DOT)
        k_rope = rope_tiles.load([k_start + start, 0]).to(DOT)
        scores = tl.dot(q_rope, k_rope.T, tl.dot(q_nope, k_nope.T))
        # The block before, whose keys are all the sequence's own. In the first turn there is none: zeros times any values.
        values = v_tiles.load([k_start + tl.maximum(start - BLOCK_N, 0), column + NOPE]).to(DOT)
        acc = tl.dot(release(held, kv.dtype.element_ty, PACK).to(DOT), values, acc * correction[:, None])
        if start + BLOCK_N > first_limit + 1:
            scores = tl.where(key[None, :] <= (first_limit - start + row)[:, None], scores, float("-inf"))
        weights, best, total, correction = softmax_step(scores, best, total, scale)
        held = hold(weights, kv.dtype.element_ty, PACK)

    # Past the sequence's end stands whatever: a NaN there must not meet even a weight of zero, neither now nor in the first turn.
    start = (num_blocks - 1) * BLOCK_N
    kv += (k_start + start).to(tl.int64) * kv_stride + column + NOPE
    values = tl.load(kv + key[:, None] * kv_stride + tl.arange(0, V)[None, :], mask=(start + key < end)[:, None], other=0.0).to(DOT)
    acc = tl.where(num_blocks > 1, acc, 0.0)
    acc = tl.dot(release(held, kv.dtype.element_ty, PACK).to(DOT), values, acc * correction[:, None])
    out += (q_start + first).to(tl.int64) * out_stride + head * out_head_stride
    tl.store(out + row[:, None] * out_stride + tl.arange(0, V)[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=is_query)
