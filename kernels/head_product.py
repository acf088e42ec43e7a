"""Each head's own small product, for a few rows: what takes a query into the latents' space and an attended latent out of it.

Programs each take whole columns of one head's weight, so that a layer's two megabytes are read by the whole device at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, wait_for_earlier

MOST_TOKENS = 1   # for more rows the vendor's batched product is faster


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program makes block_n columns of one head's output."""

    block_n: int
    num_warps: int


DEEP = Config(block_n=4, num_warps=1)     # out of the latents' space: 512 numbers in, 128 out
WIDE = Config(block_n=32, num_warps=1)     # into it


def config_for(depth: int, width: int) -> Config:
    return DEEP if depth > width else WIDE


def head_product(x: Tensor, weight: Tensor, *, out: Tensor | None = None, config: Config | None = None) -> Tensor:
    """out[t, h] = x[t, h] @ weight[h], summed in float32.

    x        [T, H, K] bf16 or fp16, any strides but the last 1
    weight   [H, K, N], any strides: reading is fastest where K's or N's is 1
    out      [T, H, N], contiguous, to be written, or None
    returns  out, or a new one in x's type

    Same bits for the same row, whatever else is in the batch. For T up to MOST_TOKENS; more are right, and slow. Raises ValueError if
    shapes do not fit.
    """
    num_tokens, num_heads, depth = x.shape
    width = weight.shape[2]
    if out is None:
        out = torch.empty(num_tokens, num_heads, width, dtype=x.dtype, device=x.device)
    if weight.shape[:2] != (num_heads, depth) or x.stride(2) != 1 or out.shape != (num_tokens, num_heads, width) or not out.is_contiguous():
        raise ValueError(f"head_product: x {tuple(x.shape)} with strides {x.stride()} and weight {tuple(weight.shape)} do not fit, or "
                         f"out {tuple(out.shape)} with strides {out.stride()}")
    config = config or config_for(depth, width)
    if num_tokens:
        _head_product[(num_heads, triton.cdiv(width, config.block_n))](
            x, weight, out, x.stride(0), x.stride(1), *weight.stride(), NUM_TOKENS=num_tokens, NUM_HEADS=num_heads, DEPTH=depth,
            WIDTH=width, BLOCK_K=triton.next_power_of_2(depth), BLOCK_N=config.block_n, num_warps=config.num_warps, launch_pdl=OVERLAPS)
    return out


def head_product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`head_product` in float32."""
    return torch.einsum("thk,hkn->thn", x.float(), weight.float())


@triton.jit
def _head_product(x, weight, out, token_stride, x_head_stride, head_stride, k_stride, n_stride, NUM_TOKENS: tl.constexpr,
                  NUM_HEADS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    head = tl.program_id(0)
    offsets = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in, is_column = offsets < DEPTH, columns < WIDTH
    w = tl.load(weight + head.to(tl.int64) * head_stride + offsets[:, None] * k_stride + columns[None, :] * n_stride,
                mask=is_in[:, None] & is_column[None, :], other=0.0)
    wait_for_earlier()
    for token in tl.static_range(NUM_TOKENS):
        row = tl.load(x + token * token_stride + head * x_head_stride + offsets, mask=is_in, other=0.0)
        product = tl.sum(w.to(tl.float32) * row.to(tl.float32)[:, None], 0)
        tl.store(out + (token * NUM_HEADS + head) * WIDTH + columns, product.to(out.dtype.element_ty), mask=is_column)
