"""Activations to e4m3, one float32 scale per 128 numbers of a row: what a product with block-scaled weights takes in.

scale = amax / 448 of the group, numbers = x * (448 / amax), rounded to nearest even: DeepSeek-V3's own rule (technical report,
3.3.2). `quantize_group` is the one place that states it; kernels that quantize on the fly call it, so all of them give the same bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_fp8 import BLOCK, E4M3_MAX, TINY
from kernels.launch import IS_INTERPRETED

ALIGNED_ROWS = 16    # what the distance of two groups' scales is a multiple of, where their rows are contiguous
_TINY = tl.constexpr(TINY)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_GROUP = tl.constexpr(BLOCK)


class Quantized(NamedTuple):
    """Rows in e4m3: data [T, K] contiguous, scale [T, K / 128] float32 with the rows or the groups contiguous.

    Where the rows are contiguous, the memory behind the scales may be read (not used) for BLOCK more rows: see `allocate`.
    """

    data: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Config:
    block_t: int         # rows of a program
    block_g: int         # groups of 128 columns of a program
    num_warps: int


# Up to this many rows -> config. A decode step wants many small programs, a prefill chunk fewer and longer ones.
CONFIGS = ((64, Config(block_t=1, block_g=4, num_warps=1)), (1 << 62, Config(block_t=2, block_g=8, num_warps=4)))


def config_for(num_rows: int) -> Config:
    return next(config for most, config in CONFIGS if num_rows <= most)


def quantize_rows(x: Tensor, *, column_major: bool = True, row_multiple: int = 1, config: Config | None = None) -> Quantized:
    """Quantize every group of 128 columns of every row.

    x             [T, K] bfloat16, float16 or float32, K a multiple of 128; rows may be strided
    column_major  scales are laid out with the rows contiguous (as `torch._scaled_mm` takes them, if T is a multiple of 16), else the groups
    row_multiple  the result is made this much longer where T is no multiple; the extra rows are never written
    returns       data [T', K] contiguous, scale [T', K / 128]

    Raises ValueError if K is not a multiple of 128. Source: DeepSeek-V3 technical report, 3.3.2.
    """
    return _launch(x, x.shape[1], False, column_major, row_multiple, config)


def silu_mul_quant(gate_up: Tensor, *, column_major: bool = True, row_multiple: int = 1, config: Config | None = None) -> Quantized:
    """quantize_rows(silu(first half) * second half) in one pass, the product in float32.

    gate_up  [T, 2I], I a multiple of 128; otherwise as in quantize_rows
    returns  data [T', I], scale [T', I / 128]
    """
    return _launch(gate_up, gate_up.shape[1] // 2, True, column_major, row_multiple, config)


def allocate(num_rows: int, num_columns: int, device: torch.device, *, column_major: bool = True) -> Quantized:
    """Room for num_rows quantized rows. Products read whole, aligned tiles of scales: between groups and at the end is room for it."""
    num_groups = num_columns // BLOCK
    long = -(-num_rows // ALIGNED_ROWS) * ALIGNED_ROWS
    data = torch.empty(num_rows, num_columns, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(num_groups * long + BLOCK, dtype=torch.float32, device=device)
    if IS_INTERPRETED:
        scale.fill_(float("nan"))   # numpy warns of the products of what happens to stand there
    strides = (1, long) if column_major else (num_groups, 1)
    return Quantized(data, scale.as_strided((num_rows, num_groups), strides))


def quantize_rows_reference(x: Tensor) -> Quantized:
    groups = x.float().unflatten(-1, (-1, BLOCK))
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(TINY)
    most = torch.full_like(amax, E4M3_MAX)   # a tensor: by a number torch may multiply with an inverse, which rounds twice
    return Quantized((groups * (most / amax)).flatten(-2).to(torch.float8_e4m3fn), (amax / most).squeeze(-1))


def silu_mul_quant_reference(gate_up: Tensor) -> Quantized:
    gate, up = gate_up.float().chunk(2, -1)
    return quantize_rows_reference(F.silu(gate) * up)


def _launch(x: Tensor, num_columns: int, is_gated: bool, column_major: bool, row_multiple: int, config: Config | None) -> Quantized:
    if num_columns % BLOCK or x.stride(1) != 1:
        raise ValueError(f"rows of {num_columns} numbers cannot be cut into groups of {BLOCK} neighbours (stride {x.stride(1)})")
    num_rows, num_groups = x.shape[0], num_columns // BLOCK
    data, scale = allocate(-(-num_rows // row_multiple) * row_multiple, num_columns, x.device, column_major=column_major)
    if num_rows:
        config = config or config_for(num_rows)
        grid = (triton.cdiv(num_rows, config.block_t), triton.cdiv(num_groups, config.block_g))
        _quantize_rows[grid](x, data, scale, num_rows, num_groups, x.stride(0), *scale.stride(), IS_GATED=is_gated,
                             BLOCK_T=config.block_t, BLOCK_G=config.block_g, num_warps=config.num_warps)
    return Quantized(data, scale)


@triton.jit
def quantize_group(x, axis: tl.constexpr):
    """x float32, its `axis` one group of 128 -> (e4m3 of the same shape, the scales without that axis)."""
    amax = tl.maximum(tl.max(tl.abs(x), axis), _TINY)
    inverse = tl.div_rn(tl.full(amax.shape, _E4M3_MAX, tl.float32), amax)
    return to_e4m3(x * tl.expand_dims(inverse, axis)), tl.div_rn(amax, tl.full(amax.shape, _E4M3_MAX, tl.float32))


@triton.jit
def to_e4m3(x):
    """float32 within +-448 -> e4m3, to nearest even."""
    if _INTERPRETED:
        # The interpreter's own cast drops the carry of a mantissa that rounds up. Rounding before it leaves it nothing to round:
        # adding and taking away 1.5 * 2^23 steps makes float32 do it.
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.maximum(power, 0.015625) * (0.125 * 12582912.0)
        x = (x + step) - step
    return x.to(tl.float8e4nv)


@triton.jit
def _quantize_rows(x_ptr, data_ptr, scale_ptr, num_rows, num_groups, x_stride, scale_row_stride, scale_group_stride,
                   IS_GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    is_in = (rows < num_rows) & (groups < num_groups)
    columns = groups[:, :, None] * _GROUP + tl.arange(0, _GROUP)[None, None, :]
    source = x_ptr + rows.to(tl.int64)[:, :, None] * x_stride + columns
    x = tl.load(source, mask=is_in[:, :, None], other=0.0).to(tl.float32)
    if IS_GATED:
        up = tl.load(source + num_groups * _GROUP, mask=is_in[:, :, None], other=0.0).to(tl.float32)
        x = x * tl.sigmoid(x) * up
    data, scale = quantize_group(x, 2)
    tl.store(data_ptr + rows.to(tl.int64)[:, :, None] * (num_groups * _GROUP) + columns, data, mask=is_in[:, :, None])
    tl.store(scale_ptr + rows * scale_row_stride + groups * scale_group_stride, scale, mask=is_in)
