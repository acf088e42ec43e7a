"""Products with DeepSeek-V3's fp8 weights: few tokens stream the weights, many multiply.

x comes in bfloat16, so quantizing it is part of the figure; the cases named "quantized before" are the product's own launch.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.block_fp8 import BLOCK, BlockFp8
from kernels.fp8_linear import (
    LIBRARY_ABOVE,
    MULTIPROCESSORS,
    Config,
    fp8_linear,
    fp8_linear_quantized,
    fp8_linear_reference,
    new_counters,
)
from kernels.quant import ALIGNED_ROWS, Quantized, quantize_rows

SHAPES = {"q_a + kv_a": (2112, 7168), "q_b": (24576, 1536), "kv_b": (32768, 512), "o": (7168, 16384), "gate + up": (4096, 7168),
          "down": (7168, 2048)}
COLD_BYTES = 200 << 20       # between two uses of one weight: three times the L2 cache
BAR = ">= 2,300 GB/s"        # three quarters of what a copy reaches on an H100


def cases() -> list[KernelCase]:
    return [
        *(_case(name, tokens) for tokens in (1, 16, 64, 128, 512) for name in SHAPES),
        *(_case(name, tokens, is_quantized=True) for tokens in (64, 128) for name in SHAPES),
        *(_case(name, tokens) for tokens in (1024, 8192) for name in ("q_a + kv_a", "o", "down")),
    ]


def offline_calls() -> list[Callable[[], object]]:
    def call(tokens: int, rows: int, columns: int) -> Callable[[], object]:
        return lambda: fp8_linear(torch.empty(tokens, columns, dtype=torch.bfloat16), _empty(rows, columns))

    return [call(1, 2112, 7168), call(16, 7168, 16384), call(64, 4096, 7168), call(128, 7168, 2048), call(2048, 2112, 7168)]


def _empty(rows: int, columns: int) -> BlockFp8:
    return BlockFp8(torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(-(-rows // BLOCK), columns // BLOCK))


def candidates(tokens: int, rows: int, columns: int, *, is_quantized: bool = False) -> list[Config]:
    """Every tile that suits the number of tokens, with K whole and split so that one to three programs run on a multiprocessor."""
    found: dict[Config, None] = {}
    for tile in _tiles(tokens):
        tiles = -(-rows // tile.block_n) * -(-tokens // tile.block_t)
        for programs in (0, 1, 2, 3):
            splits = min(16, columns // BLOCK, max(1, programs * MULTIPROCESSORS // tiles))
            if splits == 1 or tokens <= LIBRARY_ABOVE:
                found[replace(tile, splits=splits)] = None
    return [config for config in found if not (is_quantized and config.quantizes)]


def _tiles(tokens: int) -> Iterator[Config]:
    if tokens <= 32:
        block_t = 16 if tokens <= 16 else 32
        for tile in (Config(128, block_t, 4, 5), Config(64, block_t, 4, 6), Config(128, block_t, 8, 5), Config(256, block_t, 8, 3)):
            yield replace(tile, quantizes=True)
            yield tile
            yield replace(tile, uses_tma=True)
    elif tokens <= 64:
        for tile in (Config(128, 64, 8, 5), Config(128, 64, 4, 4), Config(64, 64, 4, 6), Config(256, 64, 8, 5), Config(128, 32, 4, 5)):
            yield tile
            yield replace(tile, uses_tma=True)
    else:
        for tile in (Config(128, 128, 8, 5), Config(128, 128, 8, 3), Config(256, 64, 8, 5), Config(128, 64, 8, 4)):
            yield tile
            yield replace(tile, uses_tma=True)
        yield Config(256, 128, 8, 4, uses_tma=True)
        if tokens > LIBRARY_ABOVE:
            yield Config(256, 128, 8, 4, uses_tma=True, group_t=16)


def _case(name: str, tokens: int, *, is_quantized: bool = False) -> KernelCase:
    rows, columns = SHAPES[name]
    weight_bytes = rows * columns + 4 * -(-rows // BLOCK) * (columns // BLOCK)

    def setup() -> Prepared:
        torch.manual_seed(tokens)
        num_sets = max(2, -(-COLD_BYTES // weight_bytes))
        weights = [random_weight(rows, columns) for _ in range(num_sets)]
        counters = [new_counters(weight) for weight in weights]
        x = [torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda") for _ in range(num_sets)]
        quantized = [quantize_rows(each, row_multiple=ALIGNED_ROWS) for each in x]
        wide = [weight.dequantized(torch.bfloat16) for weight in weights]

        def run(config: Config | None, index: int) -> Tensor:
            if is_quantized:
                rows_in = Quantized(quantized[index].data[:tokens], quantized[index].scale[:tokens])
                return fp8_linear_quantized(rows_in, weights[index], None, torch.bfloat16, counters=counters[index], config=config)
            return fp8_linear(x[index], weights[index], counters=counters[index], config=config)

        peers: dict[str, Callable[[int], object]] = {"bf16, F.linear": lambda index: F.linear(x[index], wide[index])}
        if rows % BLOCK == 0:
            peers["torch._scaled_mm, quantized before"] = lambda index: scaled_mm(quantized[index], weights[index])
        return Prepared(run=run, reference=lambda index: fp8_linear_reference(x[index], weights[index]), num_sets=num_sets,
                        configs=candidates(tokens, rows, columns, is_quantized=is_quantized), peers=peers)

    x_bytes = tokens * (columns + columns // 32 if is_quantized else 2 * columns)
    return KernelCase(
        kernel="fp8_linear", shape=f"{name} {rows} x {columns}, T {tokens}{', quantized before' if is_quantized else ''}",
        num_bytes=weight_bytes + x_bytes + 2 * tokens * rows, num_flops=2 * tokens * rows * columns, rate="fp8", setup=setup,
        bar=BAR if tokens <= 128 else "")


def random_weight(*shape: int) -> BlockFp8:
    """Normal numbers in e4m3, drawn as they are stored; scales so that the weights are about 0.02."""
    *batch, rows, columns = shape
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    for part in data.view(torch.uint8).view(-1, rows, columns):
        part.copy_(torch.randn(rows, columns, device="cuda").mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    scale = 1e-4 + 2e-4 * torch.rand(*batch, -(-rows // BLOCK), -(-columns // BLOCK), device="cuda")
    return BlockFp8(data, scale)


def scaled_mm(x: Quantized, weight: BlockFp8) -> Tensor:
    return torch._scaled_mm(x.data, weight.data.t(), scale_a=x.scale, scale_b=weight.scale.t(), out_dtype=torch.bfloat16)
