"""Root mean square norm of rows, alone or together with the addition to the residual stream that always precedes it.

One program per row, the row in registers: every number is read once and written once. A row's result depends on nothing else.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, wait_for_earlier
from kernels.reference import rms_norm as rms_norm_reference


@dataclass(frozen=True, slots=True)
class Config:
    num_warps: int


FEW_ROWS = 256  # below, a row is all that a multiprocessor has to do: latency counts, not how many rows fit beside each other

# (largest D, warps for few rows, warps for many): a thread holds one to four vectors of 16 bytes
NUM_WARPS = ((1024, 4, 2), (2048, 8, 4), (4096, 8, 8), (8192, 16, 8), (1 << 16, 16, 16))


def config_for(num_rows: int, dim: int) -> Config:
    few, many = next((few, many) for largest, few, many in NUM_WARPS if dim <= largest)
    return Config(few if num_rows < FEW_ROWS else many)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, *, config: Config | None = None) -> Tensor:
    """x / root mean square over D, rounded to x's type, times weight; the mean is taken in float32.

    x        [T, D], D <= 65536; rows may be strided, columns not
    weight   [D]
    out      [T, D] like x, may be x itself; None: a new tensor
    returns  out

    Raises ValueError for other shapes. Source: RMSNorm, arXiv 1910.07467; rounding as in transformers.
    """
    num_rows, dim = x.shape
    if weight.shape != (dim,) or x.stride(1) != 1 or dim > NUM_WARPS[-1][0]:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} with strides {x.stride()}, weight {tuple(weight.shape)}")
    if out is None:
        out = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    config = config or config_for(num_rows, dim)
    _rms_norm_kernel[(num_rows,)](x, weight, out, x.stride(0), out.stride(0), eps, DIM=dim, BLOCK=triton.next_power_of_2(dim),
                                  num_warps=config.num_warps, launch_pdl=OVERLAPS)
    return out


def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float, *, config: Config | None = None) -> Tensor:
    """residual += delta, in place; returns rms_norm(residual).

    delta     [T, D], or [T, k, D] whose k rows are summed first, in order (a mixture's weighted expert outputs);
              strided except for D
    residual  [T, D], rows may be strided: the sum is taken in float32 and rounded once, and that is what is normed
    weight    [D]
    returns   [T, D], new

    Raises ValueError for other shapes. Source: as rms_norm.
    """
    num_rows, dim = residual.shape
    num_parts = delta.shape[1] if delta.dim() == 3 else 1
    if (delta.shape[0], delta.shape[-1]) != (num_rows, dim) or weight.shape != (dim,) or dim > NUM_WARPS[-1][0] \
            or delta.stride(-1) != 1 or residual.stride(1) != 1:
        raise ValueError(f"add_rms_norm: delta {tuple(delta.shape)}, residual {tuple(residual.shape)}, weight {tuple(weight.shape)}")
    out = torch.empty(num_rows, dim, dtype=residual.dtype, device=residual.device)
    config = config or config_for(num_rows, dim)
    _add_rms_norm_kernel[(num_rows,)](
        delta, residual, weight, out, delta.stride(0), delta.stride(1), residual.stride(0), eps,
        NUM_PARTS=num_parts, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=config.num_warps, launch_pdl=OVERLAPS)
    return out


def add_rms_norm_reference(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As add_rms_norm, the update of `residual` included."""
    total = torch.zeros(residual.shape, device=residual.device)
    for part in delta.unsqueeze(1).flatten(1, -2).unbind(1):
        total += part
    residual.copy_(residual.float() + total)
    return rms_norm_reference(residual, weight, eps)


@triton.jit
def normed(row, weight, eps, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """A row in float32, zero past DIM -> its norm times weight, in float32; rounded to DTYPE before the product, as in transformers."""
    scale = tl.rsqrt(tl.sum(row * row, 0) / DIM + eps)
    return (row * scale).to(DTYPE).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, out_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < DIM
    gain = tl.load(weight + columns, mask=is_inside, other=0.0)  # on its way while the sum is taken
    wait_for_earlier()
    wide = tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, normed(wide, gain, eps, DIM, x.dtype.element_ty), mask=is_inside)


@triton.jit
def _add_rms_norm_kernel(delta, residual, weight, out, delta_stride, part_stride, residual_stride, eps,
                         NUM_PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < DIM
    gain = tl.load(weight + columns, mask=is_inside, other=0.0)
    wait_for_earlier()
    stream = residual + row * residual_stride + columns
    before = tl.load(stream, mask=is_inside, other=0.0).to(tl.float32)
    delta += row * delta_stride
    total = tl.load(delta + columns, mask=is_inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(delta + part * part_stride + columns, mask=is_inside, other=0.0).to(tl.float32)
    after = (before + total).to(residual.dtype.element_ty)
    tl.store(stream, after, mask=is_inside)
    tl.store(out + row * DIM + columns, normed(after.to(tl.float32), gain, eps, DIM, residual.dtype.element_ty), mask=is_inside)
