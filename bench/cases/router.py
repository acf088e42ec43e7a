"""The router's logits in steps of decodes, and with them the choice of experts: what the model waits for before its experts.

Logits alone have no reference here: how many parts they come in depends on the config.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from bench.cases.routing import MODELS
from bench.kernel_case import KernelCase, Prepared
from kernels.router import Config, router, router_reference
from kernels.routing import route

HIDDEN = {"V2-Lite": 2048, "V3": 7168}
COLD_BYTES = 200 << 20
MOST_PARTS = 32


def cases() -> list[KernelCase]:
    return [_case(model, num_tokens, is_routed=is_routed)
            for model in MODELS for num_tokens in (1, 16, 64, 128, 256) for is_routed in (False, True)]


def offline_calls() -> list[Callable[[], object]]:
    half = torch.bfloat16
    return [lambda model=model, num_tokens=num_tokens: router(  # type: ignore[misc]
        torch.empty(num_tokens, HIDDEN[model], dtype=half), torch.empty(MODELS[model][0], HIDDEN[model], dtype=half))
        for model in MODELS for num_tokens in (1, 64, 256)]


def candidates(num_tokens: int, num_experts: int, depth: int) -> list[Config]:
    """Tiles of 16 to 64 each way, the depth cut so that between 8 and 264 programs run and no more than MOST_PARTS parts result."""
    found = []
    for block_t, block_e, block_k, num_tiles in product((16, 32, 64), (16, 32, 64), (64, 128, 256), (1, 2, 4, 7)):
        parts = -(-depth // (block_k * num_tiles))
        programs = -(-num_tokens // block_t) * (num_experts // block_e) * parts
        fits_step = num_tokens <= 4 * block_t and (block_t == 16 or block_t < 2 * num_tokens)
        is_whole = depth % (block_k * num_tiles) == 0
        if is_whole and fits_step and 2 <= parts <= MOST_PARTS and (8 if parts > 7 else 24) <= programs <= 264:
            found.append(Config(block_t=block_t, block_e=block_e, block_k=block_k, num_tiles=num_tiles, num_warps=_warps(block_t, block_e),
                                num_stages=min(num_tiles + 1, 3)))
    return found


def _warps(block_t: int, block_e: int) -> int:
    return max(1, min(4, block_t * block_e // 256))


def _case(model: str, num_tokens: int, *, is_routed: bool) -> KernelCase:
    num_experts, choice = MODELS[model]
    depth = HIDDEN[model]
    weight_bytes = num_experts * depth * 2

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        num_sets = min(64, -(-COLD_BYTES // weight_bytes))
        gates = [torch.randn(num_experts, depth, device="cuda").mul_(0.02).bfloat16() for _ in range(num_sets)]
        x = [torch.randn(num_tokens, depth, device="cuda", dtype=torch.bfloat16) for _ in range(num_sets)]
        bias = torch.zeros(num_experts, device="cuda") if model == "V3" else None

        def routed(logits: Tensor) -> Tensor:
            return route(logits, bias, **choice)[1] if is_routed else logits

        def run(config: Config | None, index: int) -> Tensor:
            parts = router(x[index], gates[index], config=config)
            return route(parts, bias, **choice)[1] if is_routed else parts

        def reference(index: int) -> Tensor:
            return route(router_reference(x[index], gates[index]), bias, **choice)[1]

        return Prepared(
            run=run, reference=reference if is_routed else None, num_sets=num_sets, configs=candidates(num_tokens, num_experts, depth),
            peers={"torch.mm": lambda index: routed(torch.mm(x[index], gates[index].t(), out_dtype=torch.float32))})

    return KernelCase(
        kernel="router", shape=f"{model}, T {num_tokens}{', experts chosen' if is_routed else ''}",
        num_bytes=weight_bytes + num_tokens * (2 * depth + 4 * num_experts), num_flops=2 * num_tokens * num_experts * depth, rate="bf16",
        setup=setup, bar="<= 2 us" if model == "V2-Lite" and not is_routed else "")
