"""Products with block-scaled fp8 weights, activations quantized on the way: one rule of rounding for every number of rows.

Up to 512 rows the product is a matter of reading the weights once at full speed. Where the rows of the weight give too few
programs, K is split among several; the last to finish adds the partial sums in order, so the result does not depend on which that
was. With few tokens each program quantizes its x itself, which saves a launch. Many tokens go to cuBLAS.

A row's result depends on the other rows only by their number: another `Config` may split K elsewhere, and above 512 rows cuBLAS
adds in its own order. The quantized numbers are the same in all cases.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.block_fp8 import BLOCK, BlockFp8
from kernels.fp8_product import block_product
from kernels.launch import dot_dtype
from kernels.quant import ALIGNED_ROWS, Quantized, quantize_rows, quantize_rows_reference

LIBRARY_ABOVE = 512      # rows; cuBLAS reaches 1 PFLOP/s at thousands, and 0.4 TB/s at 64
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Config:
    block_n: int               # rows of the weight of a program: 64, 128, or 256 as two halves that share their tokens
    block_t: int               # tokens of a program
    num_warps: int
    num_stages: int
    splits: int = 1            # programs that share one output tile, each with an equal part of K: at most so many
    quantizes: bool = False    # x is quantized by every program that reads it, not by a launch of its own
    uses_tma: bool = False     # tiles come by the bulk copy engine
    group_t: int = 8           # neighbouring programs share weights over so many blocks of tokens


# Most tokens -> config, by [N, K] of the weight: DeepSeek-V3's, the fastest of `bench.tune` on an H100.
TUNED: dict[tuple[int, int], tuple[tuple[float, Config], ...]] = {
    (2112, 7168): (   # q_a + kv_a
        (16, Config(128, 16, 4, 5, 7, quantizes=True)),
        (64, Config(64, 64, 4, 6, 4, uses_tma=True)),
        (128, Config(128, 64, 8, 4, 3, uses_tma=True)),
        (2048, Config(128, 64, 8, 4, uses_tma=True)),
        (float("inf"), Config(128, 128, 8, 3, uses_tma=True))),
    (24576, 1536): (   # q_b
        (4, Config(256, 16, 8, 3)),
        (16, Config(256, 16, 8, 3, quantizes=True)),
        (64, Config(128, 64, 4, 4)),
        (512, Config(256, 128, 8, 4, uses_tma=True))),
    (32768, 512): (   # kv_b
        (4, Config(128, 16, 8, 5, quantizes=True)),
        (16, Config(256, 16, 8, 3, quantizes=True)),
        (64, Config(128, 64, 4, 4)),
        (128, Config(128, 64, 8, 4, uses_tma=True)),
        (512, Config(256, 128, 8, 4, uses_tma=True))),
    (7168, 16384): (   # o
        (4, Config(256, 16, 8, 3, 4, quantizes=True)),
        (16, Config(64, 16, 4, 6, 3, quantizes=True)),
        (64, Config(128, 64, 4, 4, 2, uses_tma=True)),
        (128, Config(128, 64, 8, 4, 3, uses_tma=True)),
        (512, Config(256, 128, 8, 4, uses_tma=True))),
    (4096, 7168): (   # gate + up
        (4, Config(256, 16, 8, 3, 8, quantizes=True)),
        (16, Config(64, 16, 4, 6, 4, quantizes=True)),
        (64, Config(64, 64, 4, 6, 2, uses_tma=True)),
        (128, Config(128, 64, 8, 4, 2, uses_tma=True)),
        (512, Config(128, 128, 8, 5, uses_tma=True))),
    (7168, 2048): (   # down
        (4, Config(256, 16, 8, 3, 4, quantizes=True)),
        (16, Config(128, 16, 8, 5, 2, quantizes=True)),
        (64, Config(64, 64, 4, 6, uses_tma=True)),
        (128, Config(128, 64, 8, 4, uses_tma=True)),
        (512, Config(256, 128, 8, 4, uses_tma=True))),
}
MULTIPROCESSORS = 132


def config_for(num_tokens: int, num_rows: int, num_columns: int) -> Config:
    for most, config in TUNED.get((num_rows, num_columns), ()):
        if num_tokens <= most:
            return config
    block_n, block_t, num_warps, per_multiprocessor = 128, max(16, triton.next_power_of_2(num_tokens)), 4, 2
    if num_tokens > 32:
        block_t, num_warps, per_multiprocessor = min(block_t, 128), 8, 1
    programs = triton.cdiv(num_rows, block_n) * max(1, triton.cdiv(num_tokens, block_t))
    splits = max(1, min(MAX_SPLITS, MULTIPROCESSORS * per_multiprocessor // programs))
    return Config(block_n, block_t, num_warps, 5, splits, quantizes=num_tokens <= 16)


class Fp8Linear:
    """x [..., K] -> x @ weight.T + bias [..., N] in x's dtype. One object must not run on two streams at once."""

    def __init__(self, weight: BlockFp8, bias: Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias
        self._counters = new_counters(weight)

    def __call__(self, x: Tensor, /) -> Tensor:
        if x.dim() == 2:
            return fp8_linear(x, self._weight, self._bias, counters=self._counters)
        rows = fp8_linear(x.reshape(-1, x.shape[-1]), self._weight, self._bias, counters=self._counters)
        return rows.view(*x.shape[:-1], rows.shape[-1])


def new_counters(weight: BlockFp8) -> Tensor:
    """How many parts of each output tile are done: zero between calls. Enough for every config and LIBRARY_ABOVE tokens."""
    tiles = triton.cdiv(weight.shape[0], 64) * triton.cdiv(LIBRARY_ABOVE, 16)
    return torch.zeros(max(tiles, 2 * MULTIPROCESSORS), dtype=torch.int32, device=weight.data.device)


def fp8_linear(x: Tensor, weight: BlockFp8, bias: Tensor | None = None, *, counters: Tensor | None = None,
               config: Config | None = None) -> Tensor:
    """x @ weight.T + bias, x rounded to e4m3 by groups of 128 columns.

    x         [T, K] bfloat16 or float16 (in the interpreter also float32), K a multiple of 128; rows may be strided
    weight    [N, K] contiguous, N a multiple of 16
    bias      [N] in x's dtype, or None
    counters  of `new_counters`, kept from call to call and not shared by streams; None makes new ones
    returns   [T, N] in x's dtype

    Raises ValueError for K or N that do not fit. Source: DeepSeek-V3 technical report, 3.3.
    """
    num_rows, num_columns = weight.shape
    if x.shape[1] != num_columns or num_columns % BLOCK or num_rows % 16:
        raise ValueError(f"no product of x {list(x.shape)} with an fp8 weight {list(weight.shape)}: K must be a multiple of {BLOCK}, "
                         "N of 16")
    num_tokens = x.shape[0]
    if config is None and _suits_library(num_tokens, x.dtype, weight):
        return _library(x, weight, bias)
    config = config or config_for(num_tokens, num_rows, num_columns)
    if config.quantizes:
        return _launch(x, None, weight, bias, x.dtype, counters, config)
    quantized = quantize_rows(x)
    return _launch(quantized.data, quantized.scale, weight, bias, x.dtype, counters, config)


def fp8_linear_quantized(x: Quantized, weight: BlockFp8, bias: Tensor | None, dtype: torch.dtype, *, counters: Tensor | None = None,
                         config: Config | None = None) -> Tensor:
    """The same for rows that are quantized already (by a fused norm or activation), by the kernel of this file alone."""
    config = config or config_for(x.data.shape[0], *weight.shape)
    return _launch(x.data, x.scale, weight, bias, dtype, counters, config)


def fp8_linear_reference(x: Tensor, weight: BlockFp8, bias: Tensor | None = None) -> Tensor:
    quantized = quantize_rows_reference(x)
    rounded = (quantized.data.float().unflatten(-1, (-1, BLOCK)) * quantized.scale.unsqueeze(-1)).flatten(-2)
    return F.linear(rounded, weight.dequantized(torch.float32), None if bias is None else bias.float())


def _suits_library(num_tokens: int, dtype: torch.dtype, weight: BlockFp8) -> bool:
    """cuBLAS wants whole blocks, and scales whose rows are multiples of 16 bytes."""
    num_rows, num_columns = weight.shape
    return (num_tokens > LIBRARY_ABOVE and dtype == torch.bfloat16 and weight.data.is_cuda and num_rows % BLOCK == 0
            and num_columns % (4 * BLOCK) == 0)


def _library(x: Tensor, weight: BlockFp8, bias: Tensor | None) -> Tensor:
    quantized = quantize_rows(x, row_multiple=ALIGNED_ROWS)
    out = torch._scaled_mm(quantized.data, weight.data.t(), scale_a=quantized.scale, scale_b=weight.scale.t(), out_dtype=x.dtype)
    out = out[: x.shape[0]]
    return out if bias is None else out + bias


def _launch(x: Tensor, scale: Tensor | None, weight: BlockFp8, bias: Tensor | None, dtype: torch.dtype, counters: Tensor | None,
            config: Config) -> Tensor:
    num_tokens, num_rows, steps = x.shape[0], weight.shape[0], weight.shape[1] // BLOCK
    out = torch.empty(num_tokens, num_rows, dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    tiles_n, tiles_t = triton.cdiv(num_rows, config.block_n), triton.cdiv(num_tokens, config.block_t)
    splits = _splits(steps, config.splits)
    partial = counters_in_use = out                               # unused without splits
    if splits > 1:
        partial = torch.empty(splits, tiles_n * tiles_t, config.block_n * config.block_t, dtype=torch.float32, device=x.device)
        counters_in_use = new_counters(weight) if counters is None else counters
        assert tiles_n * tiles_t <= counters_in_use.numel()
    if scale is not None and num_tokens > 1 and scale.stride(0) != 1:
        raise ValueError(f"scales of x with strides {scale.stride()}: their rows must be contiguous, as kernels.quant.allocate has them")
    x_source: Tensor | TensorDescriptor = x
    w_source: Tensor | TensorDescriptor = weight.data
    block_n = min(config.block_n, BLOCK)
    if config.uses_tma:
        x_source = TensorDescriptor(x, list(x.shape), list(x.stride()), [config.block_t, BLOCK])
        w_source = TensorDescriptor(weight.data, list(weight.shape), list(weight.data.stride()), [block_n, BLOCK])
    _fp8_linear[(tiles_n * tiles_t * splits,)](
        x_source, x if scale is None else scale, w_source, weight.scale, bias, out, partial, counters_in_use,
        num_tokens, steps // splits, x.stride(0), 0 if scale is None else scale.stride(1),
        ROWS=num_rows, STEPS=steps // splits, HAS_BIAS=bias is not None, QUANTIZES=scale is None, SPLITS=splits, GROUP_T=config.group_t,
        BLOCK_N=block_n, HALVES=config.block_n // block_n, BLOCK_T=config.block_t, BLOCK_K=BLOCK,
        TMA=config.uses_tma, DOT=dot_dtype(torch.float8_e4m3fn), num_warps=config.num_warps, num_stages=config.num_stages,
    )
    return out


@functools.cache
def _splits(steps: int, most: int) -> int:
    """The largest number of equal parts of `steps` that is at most `most`."""
    return max(parts for parts in range(1, min(steps, most) + 1) if steps % parts == 0)


@triton.jit(do_not_specialize=["num_tokens", "num_steps"])
def _fp8_linear(x, x_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr,
                num_tokens, num_steps, x_stride, scale_stride, ROWS: tl.constexpr, STEPS: tl.constexpr,
                HAS_BIAS: tl.constexpr, QUANTIZES: tl.constexpr, SPLITS: tl.constexpr, GROUP_T: tl.constexpr,
                BLOCK_N: tl.constexpr, HALVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
                TMA: tl.constexpr, DOT: tl.constexpr):
    # Programs that read the same weights stand together; then the parts of one tile; then the next tile.
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS
    TILES_N: tl.constexpr = (ROWS + BLOCK_N * HALVES - 1) // (BLOCK_N * HALVES)
    DEPTH: tl.constexpr = STEPS * SPLITS * BLOCK_K
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    group = tile // (GROUP_T * TILES_N)
    in_group = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
    tile_t = group * GROUP_T + tile % (GROUP_T * TILES_N) % in_group
    first_n = tile % (GROUP_T * TILES_N) // in_group * (BLOCK_N * HALVES)

    tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = first_n + tl.arange(0, BLOCK_N)
    first_column = split * STEPS * BLOCK_K
    scales = w_scale_ptr + (first_n // BLOCK_K * SPLITS + split) * STEPS
    # Where the weight ends with the first half, the second repeats its last rows; so do tokens past the end. They are never stored.
    low_scales = scales + tl.minimum((ROWS - 1) // BLOCK_K - first_n // BLOCK_K, HALVES - 1) * (SPLITS * STEPS)
    if not TMA:
        columns = (first_column + tl.arange(0, BLOCK_K))[None, :]
        x += tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride + columns
        low = w + tl.minimum(rows + BLOCK_N, ROWS - 1).to(tl.int64)[:, None] * DEPTH + columns
        w += tl.minimum(rows, ROWS - 1).to(tl.int64)[:, None] * DEPTH + columns
    else:
        low = w
    acc, low_acc = block_product(
        x, tile_t * BLOCK_T, x_scale_ptr + split * STEPS * scale_stride + tokens, scale_stride, w, first_n, scales,
        low, first_n + BLOCK_N, low_scales, first_column, num_steps, STEPS, BLOCK_N, BLOCK_T, HALVES, QUANTIZES, TMA, DOT)

    if SPLITS == 1:
        _store(tl.trans(acc), out_ptr, bias_ptr, tokens, rows, num_tokens, ROWS, HAS_BIAS)
        if HALVES == 2:
            _store(tl.trans(low_acc), out_ptr, bias_ptr, tokens, rows + BLOCK_N, num_tokens, ROWS, HAS_BIAS)
    else:
        SIZE: tl.constexpr = BLOCK_T * BLOCK_N
        inside = tl.arange(0, BLOCK_T)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        is_token = (tokens < num_tokens)[:, None]
        stride = TILES_N * tiles_t * (HALVES * SIZE)
        part_ptrs = partial_ptr + tile * (HALVES * SIZE) + inside
        tl.store(part_ptrs + split * stride, tl.trans(acc), mask=is_token)
        if HALVES == 2:
            tl.store(part_ptrs + split * stride + SIZE, tl.trans(low_acc), mask=is_token)
        # All of this program's stores, then the count: who finds it full sees every part.
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counter_ptr + tile, 0)
            for half in tl.static_range(HALVES):
                total = tl.load(part_ptrs + half * SIZE, mask=is_token, other=0.0, cache_modifier=".cg")
                for part in tl.static_range(1, SPLITS):
                    total += tl.load(part_ptrs + (half * SIZE + part * stride), mask=is_token, other=0.0, cache_modifier=".cg")
                _store(total, out_ptr, bias_ptr, tokens, rows + half * BLOCK_N, num_tokens, ROWS, HAS_BIAS)


@triton.jit
def _store(total, out_ptr, bias_ptr, tokens, rows, num_tokens, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """total [tokens, rows] + bias -> out"""
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < ROWS, other=0.0).to(tl.float32)[None, :]
    is_in = (tokens < num_tokens)[:, None] & (rows < ROWS)[None, :]
    tl.store(out_ptr + tokens.to(tl.int64)[:, None] * ROWS + rows[None, :], total.to(out_ptr.dtype.element_ty), mask=is_in)
