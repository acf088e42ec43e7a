"""A mixture's experts, both products: decoding streams the weights of every expert touched, prefill multiplies.

Up to SORTED_BY_ROUTER tokens the rows come sorted, since the router's own launch does that; above, sorting them is part of the figure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.align import align
from kernels.experts import Config, Tile, config_for, experts, experts_reference, pack_gate_up
from kernels.silu_mul import silu_mul

SORTED_BY_ROUTER = 128
FEW_TOKENS = 4          # so few touch less than the L2 cache holds: input sets choose other experts
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Mixture:
    name: str
    num_experts: int    # routed ones
    top_k: int
    num_shared: int
    hidden_size: int
    inner: int

    def ids(self, num_tokens: int, seed: int) -> Tensor:
        """[T, top_k + num_shared] int32: distinct experts, all equally likely; single tokens of successive seeds share none."""
        if num_tokens == 1:
            order = torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(0))
            routed = order.roll(-seed * self.top_k)[None, :self.top_k]
        else:
            scores = torch.rand(num_tokens, self.num_experts, generator=torch.Generator().manual_seed(seed))
            routed = scores.topk(self.top_k, 1)[1]
        shared = torch.arange(self.num_experts, self.num_experts + self.num_shared).expand(num_tokens, -1)
        return torch.cat((routed, shared), 1).int()


V2_LITE = Mixture("V2-Lite", 64, 6, 0, 2048, 1408)
V2_LITE_SHARED = Mixture("V2-Lite with shared", 64, 6, 2, 2048, 1408)
V3_PART = Mixture("V3, 64 of its experts", 64, 8, 0, 7168, 2048)
# Of an H100 (3.03 TB/s); an H200 has 1.4 times its bandwidth.
BARS = {1: "<= 42 us", 64: "<= 385 us", 8192: "<= 1,520 us"}


def cases() -> list[KernelCase]:
    return [
        *(_case(V2_LITE, num_tokens, BARS.get(num_tokens, "")) for num_tokens in (1, 4, 16, 64, 128, 256, 1024, 8192)),
        *(_case(V2_LITE_SHARED, num_tokens) for num_tokens in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192)),
        *(_case(V3_PART, num_tokens) for num_tokens in (1, 16, 128, 1024, 8192))]


def offline_calls() -> list[Callable[[], object]]:
    return [lambda mixture=mixture, num_tokens=num_tokens: _offline(mixture, num_tokens)  # type: ignore[misc]
            for mixture in (V2_LITE_SHARED, V3_PART) for num_tokens in (1, 128, 512, 8192)]


def _offline(mixture: Mixture, num_tokens: int) -> Tensor:
    hidden_size, inner = mixture.hidden_size, mixture.inner
    num_experts = mixture.num_experts + mixture.num_shared
    half = torch.bfloat16
    return experts(torch.empty(num_tokens, hidden_size, dtype=half), torch.empty(num_experts, 2 * inner, hidden_size, dtype=half),
                   torch.empty(num_experts, hidden_size, inner, dtype=half), mixture.ids(num_tokens, 0),
                   torch.empty(num_tokens, mixture.top_k + mixture.num_shared))


def candidates(num_tokens: int) -> list[Config]:
    """The first tile of each list with all others, in either product: the best of each is then known, and likely the best pair."""
    found: list[Config] = []
    for block_m, tiles in _tiles(num_tokens):
        found += [Config(block_m=block_m, gate_up=tile, down=tiles[0]) for tile in tiles]
        found += [Config(block_m=block_m, gate_up=tiles[0], down=tile) for tile in tiles[1:]]
        if num_tokens <= SORTED_BY_ROUTER:
            found.append(Config(block_m=block_m, gate_up=tiles[0], down=tiles[0], prefetches=True))
    return found


def _tiles(num_tokens: int) -> Iterator[tuple[int, list[Tile]]]:
    """Block sizes that suit the step, each with tiles that fit in registers and shared memory."""
    if num_tokens <= 128:
        yield 16, STREAMING
    if 64 <= num_tokens <= 256:
        yield 32, [tile for tile in STREAMING if tile.block_n == 128 or (tile.is_swapped and tile.block_k == 128)]
    if 256 <= num_tokens <= 1024:
        yield 64, MIDDLE
    if num_tokens >= 512:
        yield 128, LARGE


def _pointer(block_n: int, block_k: int, num_stages: int, num_warps: int = 4) -> Tile:
    return Tile(block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)


def _swapped(block_n: int, block_k: int, num_stages: int, num_warps: int = 4) -> Tile:
    return Tile(block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages, is_swapped=True, uses_tma=True)


def _bulk(block_n: int, block_k: int, num_stages: int, num_warps: int = 8, group_m: int = 8, *, is_persistent: bool = False) -> Tile:
    return Tile(block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages, group_m=group_m, uses_tma=True,
                is_persistent=is_persistent)


STREAMING = [
    _pointer(64, 128, 5), _pointer(64, 128, 4), _pointer(64, 256, 4), _pointer(64, 128, 7), _pointer(32, 256, 4), _pointer(128, 128, 4),
    _pointer(128, 128, 4, num_warps=8), _pointer(128, 64, 7), _bulk(64, 128, 5, num_warps=4, group_m=1),
    replace(_swapped(64, 128, 5), uses_tma=False), _swapped(64, 128, 5), _swapped(64, 256, 4), _swapped(128, 128, 4), _swapped(128, 64, 6)]
MIDDLE = [
    _bulk(128, 64, 4, num_warps=4, group_m=1), _bulk(128, 64, 6, num_warps=4, group_m=1), _bulk(128, 128, 3, num_warps=4, group_m=1),
    _pointer(128, 64, 4), _pointer(256, 64, 4, num_warps=8), _bulk(256, 64, 4, group_m=1), _bulk(256, 64, 3, num_warps=4, group_m=1)]
LARGE = [
    _bulk(256, 64, 4), _bulk(256, 64, 3), _bulk(256, 64, 4, group_m=4), _bulk(256, 64, 4, group_m=16), _bulk(256, 64, 4, group_m=1),
    _bulk(256, 64, 3, is_persistent=True), _bulk(256, 64, 4, is_persistent=True), replace(_bulk(256, 64, 4), uses_tma=False),
    _bulk(128, 64, 4), _bulk(128, 64, 3), _bulk(128, 64, 3, num_warps=4), _bulk(128, 128, 3)]


def _case(mixture: Mixture, num_tokens: int, bar: str = "") -> KernelCase:
    hidden_size, inner, num_all = mixture.hidden_size, mixture.inner, mixture.num_experts + mixture.num_shared
    num_sets = 8 if num_tokens <= FEW_TOKENS else 2
    all_ids = [mixture.ids(num_tokens, seed) for seed in range(num_sets)]
    num_touched = sum(len(set(ids.flatten().tolist())) for ids in all_ids) / num_sets   # on average
    num_rows = all_ids[0].numel()

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        gate_up = _normal(num_all, 2 * inner, hidden_size) * 0.02
        down = _normal(num_all, hidden_size, inner) * 0.02
        packed = pack_gate_up(gate_up)
        x = [_normal(num_tokens, hidden_size) for _ in range(num_sets)]
        ids = [tensor.cuda() for tensor in all_ids]
        weights = [torch.rand(tensor.shape, device="cuda") for tensor in ids]
        sorted_by_router = {(block_m, index): align(ids[index], num_all, block_m) for block_m in BLOCK_SIZES for index in range(num_sets)}

        def run(config: Config | None, index: int) -> Tensor:
            config = config or config_for(num_tokens, hidden_size, inner)
            aligned = sorted_by_router[config.block_m, index] if num_tokens <= SORTED_BY_ROUTER else None
            return experts(x[index], packed, down, ids[index], weights[index], aligned=aligned, config=config)

        return Prepared(
            run=run, reference=lambda index: experts_reference(x[index], gate_up, down, ids[index], weights[index]), num_sets=num_sets,
            configs=candidates(num_tokens),
            peers={"torch._grouped_mm": lambda index: grouped_mm(x[index], gate_up, down, ids[index], weights[index])})

    return KernelCase(
        kernel="experts", shape=f"{mixture.name}, {num_tokens} tokens, {num_touched:.0f} experts touched",
        num_bytes=2 * (int(num_touched * 3 * inner) + num_tokens + num_rows) * hidden_size,
        num_flops=6 * num_rows * hidden_size * inner, rate="bf16", setup=setup, bar=bar)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The same by the library's grouped product, what it cannot fuse in launches between: gather, SwiGLU, weights and scatter."""
    by_expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(1, gate_up.shape[0] + 1, dtype=torch.int32, device=ids.device), out_int32=True)
    gated = silu_mul(torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends))
    rows = torch._grouped_mm(gated, down.transpose(1, 2), offs=ends)
    out = torch.empty_like(rows)
    out[order] = rows * weights.flatten()[order, None].to(rows.dtype)
    return out.view(*ids.shape, -1)
