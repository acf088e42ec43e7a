"""The end of a single sequence's latent attention in one launch: partial results are added up and leave the latents' space.

`split_combine` and `head_product` in one: each program adds up its head's parts, which lie in the L2 cache, and makes some of its columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, wait_for_earlier
from kernels.split_combine import combined_row
from kernels.split_schedule import SplitSchedule

BLOCK_N, NUM_WARPS, PARTS_BLOCK = 16, 4, 16


def combined_product(attended: Tensor, results: Tensor, log_sums: Tensor, seq_lens: Tensor, schedule: SplitSchedule, weight: Tensor,
                     out: Tensor) -> Tensor:
    """out[n, h] = combined[n, h] @ weight[h], summed in float32; zeros where the length is 0.

    attended, results, log_sums  as `mla_decode_parts` leaves them: rows [N, H, K] that one program finished, parts of the others
    seq_lens                     [N] int32
    weight                       [H, K, M], any strides, K a power of two
    out                          [N, H, M], contiguous

    For few sequences: every program reads all parts of its head. Raises ValueError if shapes do not fit.
    """
    num_seqs, num_heads, depth = attended.shape
    width = weight.shape[2]
    if weight.shape[:2] != (num_heads, depth) or depth & (depth - 1) or out.shape != (num_seqs, num_heads, width) \
            or not out.is_contiguous() or attended.stride(2) != 1:
        raise ValueError(f"combined_product: attended {tuple(attended.shape)}, weight {tuple(weight.shape)}, out {tuple(out.shape)}")
    if num_seqs:
        _combined_product[(num_heads, triton.cdiv(width, BLOCK_N), num_seqs)](
            attended, results, log_sums, seq_lens, schedule.owners, weight, out, attended.stride(0), attended.stride(1), *weight.stride(),
            NUM_HEADS=num_heads, DEPTH=depth, WIDTH=width, BLOCK_N=BLOCK_N, PARTS_BLOCK=PARTS_BLOCK, num_warps=NUM_WARPS,
            launch_pdl=OVERLAPS)
    return out


def combined_product_reference(combined: Tensor, weight: Tensor) -> Tensor:
    """`combined_product` in float32, of rows that are added up already."""
    return torch.einsum("nhk,hkm->nhm", combined.float(), weight.float())


@triton.jit
def _combined_product(attended, results, log_sums, seq_lens, owners, weight, out, seq_stride, attended_head_stride, head_stride, k_stride,
                      n_stride, NUM_HEADS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
                      PARTS_BLOCK: tl.constexpr):
    head, seq = tl.program_id(0), tl.program_id(2)
    offsets = tl.arange(0, DEPTH)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < WIDTH
    w = tl.load(weight + head.to(tl.int64) * head_stride + offsets[:, None] * k_stride + columns[None, :] * n_stride,
                mask=is_column[None, :], other=0.0)
    wait_for_earlier()
    length = tl.load(seq_lens + seq)
    first, last = tl.load(owners + seq * 2), tl.load(owners + seq * 2 + 1)
    row = tl.zeros([DEPTH], tl.float32)
    if length > 0:
        if first == last:
            row = tl.load(attended + seq * seq_stride + head * attended_head_stride + offsets).to(tl.float32)
        else:
            row = combined_row(results, log_sums, first, last, head, offsets, offsets < DEPTH, NUM_HEADS, DEPTH, DEPTH, PARTS_BLOCK)
    row = row.to(attended.dtype.element_ty).to(tl.float32)   # as a result of its own would be rounded
    product = tl.sum(w.to(tl.float32) * row[:, None], 0)
    tl.store(out + (seq * NUM_HEADS + head) * WIDTH + columns, product.to(out.dtype.element_ty), mask=is_column)
