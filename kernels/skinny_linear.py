"""Products of up to 16 rows with fixed weights: nothing but reading the weights once, from as many programs as the device can hold.

For very few rows of x, whole rows of the weight at once on the ordinary cores, in many programs that each wait once for their loads;
for more, tiles on the matrix unit. Knows no fp8 (`kernels.fp8_linear`) and splits no depth: a program finishes its outputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, dot_dtype, wait_for_earlier

MOST_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program makes block_n columns of the output for all rows of x.

    block_k  columns of a tile on the matrix unit; 0: whole rows at once, on the ordinary cores
    """

    block_n: int
    num_warps: int
    block_k: int = 0
    num_stages: int = 1


# By the weight's [N, K], the most rows of x that a config is for; beyond the last, and for other weights, the vendor's product is taken.
# Only what `bench.tune` has shown to be faster on a GPU belongs here: so far V2-Lite's products of one and two rows.
Table = tuple[tuple[int, Config], ...]
ROWS, TILES = Config(block_n=1, num_warps=1), Config(block_n=16, num_warps=2, block_k=256, num_stages=4)
TABLES: dict[tuple[int, int], Table] = {
    (3648, 2048): ((2, Config(block_n=1, num_warps=2)),),
    (2048, 2048): ((1, Config(block_n=2, num_warps=4)), (2, Config(block_n=2, num_warps=1))),
    (21888, 2048): ((1, Config(block_n=2, num_warps=1)), (2, Config(block_n=1, num_warps=2))),
    (2048, 10944): ((2, Config(block_n=1, num_warps=8)),)}


def table_for(weight: Tensor) -> Table:
    """The configs for a weight, none where the vendor's product is not beaten. A table's last entry has the most rows."""
    num_columns, depth = weight.shape
    return TABLES.get((num_columns, depth), ())


def config_for(num_tokens: int, table: Table) -> Config | None:
    return next((config for most, config in table if num_tokens <= most), None)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None,
                  config: Config | None = None) -> Tensor:
    """x @ weight.T + bias, summed in float32.

    x        [T, K] bf16 or fp16, T up to 16, rows may be strided
    weight   [N, K], contiguous, of x's type      bias  [N] or None
    returns  [T, N] in out_dtype, x's own if None

    Same bits for the same row and config, whatever else is in the batch; the config follows T. Raises ValueError if shapes or types
    do not fit, and for a weight without a table if no config is given.
    """
    num_tokens, depth = x.shape
    width = weight.shape[0]
    if weight.shape[1] != depth or weight.dtype != x.dtype or x.stride(1) != 1 or not weight.is_contiguous() or num_tokens > MOST_TOKENS:
        raise ValueError(f"skinny_linear: x {x.dtype} {tuple(x.shape)} with strides {x.stride()} and weight {weight.dtype} "
                         f"{tuple(weight.shape)} do not fit, or x has more than {MOST_TOKENS} rows")
    config = config or config_for(num_tokens, table_for(weight))
    if config is None:
        raise ValueError(f"skinny_linear: no config for {num_tokens} rows by a weight of {tuple(weight.shape)}")
    out = torch.empty(num_tokens, width, dtype=out_dtype or x.dtype, device=x.device)
    grid = (triton.cdiv(width, config.block_n),)
    if num_tokens and config.block_k:
        _by_tiles[grid](
            x, weight, bias, out, num_tokens, x.stride(0), WIDTH=width, DEPTH=depth, BLOCK_T=8 if num_tokens <= 8 else 16,
            BLOCK_N=config.block_n, BLOCK_K=config.block_k, DOT=dot_dtype(x.dtype), num_warps=config.num_warps,
            num_stages=config.num_stages, launch_pdl=OVERLAPS)
    elif num_tokens:
        _by_rows[grid](
            x, weight, bias, out, x.stride(0), NUM_TOKENS=num_tokens, WIDTH=width, DEPTH=depth, BLOCK_N=config.block_n,
            BLOCK_K=triton.next_power_of_2(depth), num_warps=config.num_warps, launch_pdl=OVERLAPS)
    return out


def skinny_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`skinny_linear` in float32."""
    product = x.float() @ weight.float().t()
    return product if bias is None else product + bias.float()


@triton.jit
def _by_rows(x, weight, bias, out, row_stride, NUM_TOKENS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    is_column, is_in = columns < WIDTH, offsets < DEPTH
    w = tl.load(weight + columns[:, None].to(tl.int64) * DEPTH + offsets[None, :], mask=is_column[:, None] & is_in[None, :], other=0.0,
                eviction_policy="evict_first")
    wait_for_earlier()
    for token in tl.static_range(NUM_TOKENS):
        row = tl.load(x + token * row_stride + offsets, mask=is_in, other=0.0)
        product = tl.sum(w.to(tl.float32) * row.to(tl.float32)[None, :], 1)
        if bias is not None:
            product += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
        tl.store(out + token * WIDTH + columns, product.to(out.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["num_tokens"])
def _by_tiles(x, weight, bias, out, num_tokens, row_stride, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_T: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    """The weight's rows on the side of the matrix unit that holds 16 of them, tokens on the one that holds 8."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, BLOCK_T)
    offsets = tl.arange(0, BLOCK_K)
    is_column, is_token = columns < WIDTH, tokens < num_tokens
    weight_rows = weight + columns[:, None].to(tl.int64) * DEPTH + offsets[None, :]
    rows = x + tokens[:, None] * row_stride + offsets[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    wait_for_earlier()
    for k in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            w = tl.load(weight_rows + k, mask=is_column[:, None], other=0.0, eviction_policy="evict_first")
            a = tl.load(rows + k, mask=is_token[:, None], other=0.0)
        else:
            is_in = (offsets < DEPTH - k)[None, :]
            w = tl.load(weight_rows + k, mask=is_column[:, None] & is_in, other=0.0, eviction_policy="evict_first")
            a = tl.load(rows + k, mask=is_token[:, None] & is_in, other=0.0)
        acc = tl.dot(w.to(DOT), tl.trans(a.to(DOT)), acc)
    if bias is not None:
        acc += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[:, None]
    tl.store(out + tokens[None, :] * WIDTH + columns[:, None], acc.to(out.dtype.element_ty), mask=is_column[:, None] & is_token[None, :])
