"""V2-Lite's dense products in steps of up to 16 decodes: reading the weights is all there is to them."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.skinny_linear import ROWS, TABLES, TILES, Config, config_for, skinny_linear, skinny_linear_reference

SHAPES = {"q + kv_a": (3648, 2048), "o": (2048, 2048), "gate + up": (21888, 2048), "down": (2048, 10944), "head": (102400, 2048)}
BARS = {"q + kv_a": "<= 4.5 us", "o": "<= 3.3 us"}
COLD_BYTES = 200 << 20       # between two uses of one weight: three times the L2 cache
MOST_BY_ROWS = 4


def cases() -> list[KernelCase]:
    return [_case(name, num_tokens) for name in SHAPES for num_tokens in (1, 2, 4, 8, 16)]


def offline_calls() -> list[Callable[[], object]]:
    def call(name: str, num_tokens: int) -> Callable[[], object]:
        return lambda: _product(torch.empty(num_tokens, SHAPES[name][1], dtype=torch.bfloat16),
                                torch.empty(SHAPES[name], dtype=torch.bfloat16), name,
                                _usual(name, num_tokens))

    return [call("q + kv_a", 1), call("q + kv_a", 4), call("down", 1), call("down", 16), call("head", 1), call("head", 8)]


def candidates(num_tokens: int, width: int, depth: int) -> list[Config]:
    found = []
    if num_tokens <= MOST_BY_ROWS:
        elements = 1 << (depth - 1).bit_length()
        for block_n, num_warps in product((1, 2, 4, 8), (1, 2, 4, 8)):
            per_thread = elements * block_n // (32 * num_warps)
            if 32 <= per_thread <= 128 and width // block_n >= 264:
                found.append(Config(block_n=block_n, num_warps=num_warps))
    for block_n, block_k, num_stages in product((16, 32), (128, 256, 512), (2, 3, 4, 6, 8)):
        tile_bytes = 2 * (block_n + 16) * block_k * num_stages
        if 24 << 10 <= tile_bytes <= 112 << 10 and block_k * (num_stages - 1) <= depth:
            found += [Config(block_n=block_n, num_warps=num_warps, block_k=block_k, num_stages=num_stages)
                      for num_warps in ((1, 2) if block_n == 16 else (2, 4))]
    return found


def _usual(name: str, num_tokens: int) -> Config:
    return config_for(num_tokens, TABLES.get(SHAPES[name], ())) or (ROWS if num_tokens <= 2 else TILES)


def _product(x: Tensor, weight: Tensor, name: str, config: Config | None) -> Tensor:
    return skinny_linear(x, weight, out_dtype=torch.float32 if name == "head" else None, config=config)


def _case(name: str, num_tokens: int) -> KernelCase:
    width, depth = SHAPES[name]
    weight_bytes = width * depth * 2

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        num_sets = max(2, -(-COLD_BYTES // weight_bytes))
        weights = [torch.randn(width, depth, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in range(num_sets)]
        x = [torch.randn(num_tokens, depth, device="cuda", dtype=torch.bfloat16) for _ in range(num_sets)]
        out_dtype = torch.float32 if name == "head" else torch.bfloat16
        return Prepared(
            run=lambda config, index: _product(x[index], weights[index], name, config or _usual(name, num_tokens)),
            reference=lambda index: skinny_linear_reference(x[index], weights[index]), num_sets=num_sets,
            configs=candidates(num_tokens, width, depth),
            peers={"torch.mm": lambda index: torch.mm(x[index], weights[index].t(), out_dtype=out_dtype)})

    out_bytes = 4 if name == "head" else 2
    return KernelCase(
        kernel="skinny_linear", shape=f"{name} {width} x {depth}, T {num_tokens}",
        num_bytes=weight_bytes + num_tokens * (2 * depth + out_bytes * width), num_flops=2 * num_tokens * width * depth, rate="bf16",
        setup=setup, bar=BARS.get(name, "") if num_tokens == 1 else "")
