"""DeepSeek-V3's routed experts in fp8, all 256 of one layer (11.3 GB): few tokens stream the experts they touch, many multiply."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.cases.experts import Mixture
from bench.cases.fp8_linear import random_weight
from bench.kernel_case import KernelCase, Prepared
from kernels.align import align
from kernels.block_fp8 import BLOCK, BlockFp8
from kernels.fp8_experts import Config, Tile, config_for, fp8_experts, fp8_experts_reference

V3 = Mixture("V3", 256, 8, 0, 7168, 2048)
SORTED_BY_ROUTER = 64        # up to so many tokens the router's own launch sorts the rows; above, sorting is part of the figure
BLOCK_SIZES = (16, 32, 64, 128)
BARS = dict.fromkeys((1, 16, 64, 128), ">= 2,300 GB/s")
NUM_SETS = 4


def cases() -> list[KernelCase]:
    return [_case(num_tokens) for num_tokens in (1, 16, 64, 128, 256, 1024, 4096, 8192)]


def offline_calls() -> list[Callable[[], object]]:
    def empty(*shape: int) -> BlockFp8:
        return BlockFp8(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(shape[0], shape[1] // BLOCK, shape[2] // BLOCK))

    def call(num_tokens: int, num_experts: int = 4) -> Callable[[], object]:
        ids = torch.zeros(num_tokens, V3.top_k, dtype=torch.int32)
        return lambda: fp8_experts(
            torch.empty(num_tokens, V3.hidden_size, dtype=torch.bfloat16), empty(num_experts, 2 * V3.inner, V3.hidden_size),
            empty(num_experts, V3.hidden_size, V3.inner), ids, torch.empty(ids.shape))

    return [call(num_tokens) for num_tokens in (1, 8, 32, 512)]


def candidates(num_tokens: int) -> list[Config]:
    """The first tile of each list with all others, in either product."""
    found: list[Config] = []
    for block_m, gate_up, down in _tiles(num_tokens):
        found += [Config(block_m=block_m, gate_up=tile, down=down[0]) for tile in gate_up]
        found += [Config(block_m=block_m, gate_up=gate_up[0], down=tile) for tile in down[1:]]
    return found


def _tiles(num_tokens: int) -> Iterator[tuple[int, list[Tile], list[Tile]]]:
    """Block sizes that suit the step, each with tiles of gate and up and tiles of down that fit."""
    def tiles(*sizes: tuple[int, int, int, int]) -> list[Tile]:
        return [Tile(num_warps=warps, num_stages=stages, block_n=block_n, group_m=group_m, uses_tma=uses_tma)
                for warps, stages, block_n, group_m in sizes for uses_tma in (True, False)]

    if num_tokens <= 512:
        yield 16, tiles((4, 3, BLOCK, 1), (8, 3, BLOCK, 1), (4, 6, BLOCK, 1)), \
            tiles((4, 5, 128, 1), (4, 4, 128, 1), (4, 6, 64, 1), (8, 5, 128, 1), (8, 3, 256, 1), (4, 3, 256, 1))
    if 256 <= num_tokens <= 1024:
        yield 32, tiles((4, 3, BLOCK, 1), (8, 3, BLOCK, 1), (8, 5, BLOCK, 1), (8, 5, BLOCK, 2)), \
            tiles((4, 5, 128, 1), (8, 5, 128, 1), (8, 3, 256, 1), (8, 5, 256, 2))
    if 1024 <= num_tokens <= 4096:
        yield 64, tiles((8, 5, BLOCK, 4), (8, 4, BLOCK, 4), (8, 5, BLOCK, 1), (8, 5, BLOCK, 8)), \
            tiles((8, 5, 256, 4), (8, 5, 256, 1), (8, 4, 128, 4), (4, 4, 128, 4))
    if num_tokens >= 2048:
        yield 128, tiles((8, 4, BLOCK, 8), (8, 3, BLOCK, 8), (8, 4, BLOCK, 4), (8, 4, BLOCK, 16), (16, 4, BLOCK, 8)), \
            tiles((8, 4, 256, 8), (8, 3, 256, 8), (8, 4, 256, 4), (8, 5, 128, 8), (8, 3, 128, 8))


@functools.cache
def _weights() -> tuple[BlockFp8, BlockFp8]:
    return random_weight(V3.num_experts, 2 * V3.inner, V3.hidden_size), random_weight(V3.num_experts, V3.hidden_size, V3.inner)


def _case(num_tokens: int) -> KernelCase:
    all_ids = [V3.ids(num_tokens, seed) for seed in range(NUM_SETS)]
    num_touched = min(len(set(ids.flatten().tolist())) for ids in all_ids)
    num_rows = all_ids[0].numel()

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        gate_up, down = _weights()
        x = [torch.randn(num_tokens, V3.hidden_size, dtype=torch.bfloat16, device="cuda") for _ in range(NUM_SETS)]
        ids = [tensor.cuda() for tensor in all_ids]
        weights = [torch.rand(tensor.shape, device="cuda") for tensor in ids]
        by_router = {(block_m, index): align(ids[index], V3.num_experts, block_m) for block_m in BLOCK_SIZES for index in range(NUM_SETS)}

        def run(config: Config | None, index: int) -> Tensor:
            config = config or config_for(num_rows, V3.num_experts)
            aligned = by_router[config.block_m, index] if num_tokens <= SORTED_BY_ROUTER else None
            return fp8_experts(x[index], gate_up, down, ids[index], weights[index], aligned=aligned, config=config)

        return Prepared(run=run, reference=lambda index: fp8_experts_reference(x[index], gate_up, down, ids[index], weights[index]),
                        num_sets=NUM_SETS, configs=candidates(num_tokens))

    weight_bytes = 3 * V3.inner * V3.hidden_size * (1 + 4 / BLOCK**2)
    return KernelCase(
        kernel="fp8_experts", shape=f"V3, {num_tokens} tokens, {num_touched} experts touched",
        num_bytes=int(num_touched * weight_bytes) + 2 * (num_tokens + num_rows) * V3.hidden_size,
        num_flops=6 * num_rows * V3.hidden_size * V3.inner, rate="fp8", setup=setup, bar=BARS.get(num_tokens, ""), max_error=2e-2)
