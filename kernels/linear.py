"""Matrix products with fixed weights, packed once at load for the device at hand.

On a CPU most of a decode step is reading weights. Figures of one x86 machine with AVX-512, 2 threads, 3072 x 576 in float32,
1 / 16 / 512 rows of x: F.linear 450 / 670 / 9,900 us, oneDNN packed 210 / 230 / 4,200 us, float16 packed 100 / 180 / 4,600 us.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounding to float16 that is below what float32 arithmetic itself rounds: then half the bytes give the same numbers.
FLOAT32_EPSILON = 2.0**-24


class Linear(Protocol):
    """x [..., K] -> x @ weight.T + bias [..., N], in x's dtype."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """weight [N, K], bias [N] or None: torch's own, on any device."""
    return lambda x: F.linear(x, weight, bias)


def cpu_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """weight [N, K], bias [N] or None: the fastest form that this machine has and that computes the same numbers.

    float32 weights that float16 holds without loss (checkpoints in float16 and nearly all in bfloat16) are stored as float16
    and widened inside of the product, which is computed in float32.
    """
    if weight.dtype == torch.float32 and torch.backends.quantized.engine in ("x86", "fbgemm") and is_float16_exact(weight):
        return _float16_linear(weight, bias)
    if torch._C._has_mkldnn:
        return _onednn_linear(weight, bias)
    return plain_linear(weight, bias)


def is_float16_exact(weight: Tensor) -> bool:
    """Whether rounding `weight` [N, K] to float16 changes it by less than float32's rounding, measured over the whole matrix."""
    error = torch.linalg.vector_norm(weight.half().float().sub_(weight))
    return bool(error <= FLOAT32_EPSILON * torch.linalg.vector_norm(weight))


def _float16_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: product(x, packed)


def _onednn_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")
