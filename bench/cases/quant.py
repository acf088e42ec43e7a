"""Rows to e4m3: between the norms and gates of an fp8 model and its products. Bound by memory, or by the launch itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.quant import (
    Config,
    quantize_rows,
    quantize_rows_reference,
    silu_mul_quant,
    silu_mul_quant_reference,
)

MANY_TOKENS = 1024
COLD_BYTES = 200 << 20       # between two uses of one input set: three times the L2 cache


def cases() -> list[KernelCase]:
    return [
        *(_case("rows", quantize_rows, quantize_rows_reference, tokens, width, width)
          for tokens, width in ((1, 7168), (64, 7168), (128, 16384), (512, 7168), (4096, 7168), (8192, 16384))),
        *(_case("SwiGLU", silu_mul_quant, silu_mul_quant_reference, tokens, 2 * inner, inner)
          for tokens, inner in ((1, 18432), (128, 2048), (4096, 2048), (4096, 18432))),
    ]


def offline_calls() -> list[Callable[[], object]]:
    def rows(tokens: int, width: int) -> Tensor:
        return torch.empty(tokens, width, dtype=torch.bfloat16)

    return [lambda: quantize_rows(rows(8, 7168)), lambda: quantize_rows(rows(512, 7168), row_multiple=16),
            lambda: silu_mul_quant(rows(8, 4096)), lambda: silu_mul_quant(rows(512, 36864))]


CONFIGS = [Config(block_t=block_t, block_g=block_g, num_warps=num_warps)
           for block_t, block_g, num_warps in ((1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 8, 1), (1, 8, 2), (1, 8, 4), (1, 16, 4), (2, 8, 4),
                                               (4, 4, 4), (4, 8, 4), (8, 8, 8), (8, 2, 4), (16, 1, 4), (16, 2, 4), (32, 1, 4))]


def _case(name: str, op: Callable[..., Any], reference: Callable[..., Any], tokens: int, width: int, columns: int) -> KernelCase:
    num_bytes = tokens * (2 * width + columns + columns // 32)
    is_decode = tokens < MANY_TOKENS

    def setup() -> Prepared:
        torch.manual_seed(tokens)
        # A decode step finds its rows in the cache: two small sets. A prefill chunk does not.
        sets = [torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
                for _ in range(2 if is_decode else max(2, -(-COLD_BYTES // num_bytes)))]
        return Prepared(run=lambda config, index: op(sets[index], config=config).data,
                        reference=lambda index: reference(sets[index]).data.float(), num_sets=len(sets), configs=CONFIGS)

    return KernelCase(kernel="quant", shape=f"{name}, T {tokens}, {columns} columns", num_bytes=num_bytes, num_flops=0, rate="fp32",
                      setup=setup, bar="" if is_decode else ">= 2,400 GB/s")
