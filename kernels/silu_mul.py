"""The gate of a gated feed-forward block: silu(gate) * up."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Config:
    block: int         # columns of one program
    num_warps: int


def config_for(num_rows: int, inner: int) -> Config:
    """Few rows want many programs; otherwise each thread takes one vector of 16 bytes from each half."""
    if num_rows * inner <= 1 << 18:
        return Config(block=256, num_warps=1)
    return Config(block=1024, num_warps=4)


def silu_mul(gate_up: Tensor, *, config: Config | None = None) -> Tensor:
    """silu(first half) * second half, computed in float32 and rounded once.

    gate_up  [T, 2I]; rows may be strided, columns not
    returns  [T, I]

    Raises ValueError for other shapes. Source: GLU variants, arXiv 2002.05202.
    """
    num_rows, width = gate_up.shape
    if width % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"silu_mul: gate_up {tuple(gate_up.shape)} with strides {gate_up.stride()}")
    inner = width // 2
    out = torch.empty(num_rows, inner, dtype=gate_up.dtype, device=gate_up.device)
    config = config or config_for(num_rows, inner)
    # Rows stand on the grid's first axis: the others end at 65535.
    _silu_mul_kernel[(num_rows, triton.cdiv(inner, config.block))](gate_up, out, gate_up.stride(0), INNER=inner, BLOCK=config.block,
                                                                    num_warps=config.num_warps)
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, stride, INNER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < INNER
    source = gate_up + row * stride + columns
    gate = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(source + INNER, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + row * INNER + columns, gate * tl.sigmoid(gate) * up, mask=is_inside)
