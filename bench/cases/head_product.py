"""The products into and out of the latents' space in small decode steps, at V2-Lite's and V3's number of heads."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels.head_product import MOST_TOKENS, Config, head_product, head_product_reference

NOPE, ROPE, V, LATENT = 128, 64, 128, 512
COLD_BYTES = 200 << 20


def cases() -> list[KernelCase]:
    return [_case(num_heads, num_tokens, is_out=is_out)
            for num_heads in (16, 128) for num_tokens in (1, 2, MOST_TOKENS) for is_out in (False, True)]


def offline_calls() -> list[Callable[[], object]]:
    def call(num_tokens: int, *, is_out: bool) -> Callable[[], object]:
        return lambda: head_product(*_inputs(16, num_tokens, torch.device("cpu"), is_out=is_out))

    return [call(1, is_out=False), call(MOST_TOKENS, is_out=False), call(1, is_out=True), call(MOST_TOKENS, is_out=True)]


def candidates(width: int, depth: int) -> list[Config]:
    return [Config(block_n=block_n, num_warps=num_warps) for block_n, num_warps in product((4, 8, 16, 32, 64, 128), (1, 2, 4, 8))
            if block_n <= width and 16 <= depth * block_n // (32 * num_warps) <= 128]


def _inputs(num_heads: int, num_tokens: int, device: torch.device, *, is_out: bool) -> tuple[Tensor, Tensor]:
    """x and weight, views as the model has them."""
    kv_b = torch.empty(num_heads, NOPE + V, LATENT, dtype=torch.bfloat16, device=device)
    if is_out:
        return torch.empty(num_tokens, num_heads, LATENT, dtype=torch.bfloat16, device=device), kv_b[:, NOPE:].transpose(1, 2)
    return torch.empty(num_tokens, num_heads, NOPE + ROPE, dtype=torch.bfloat16, device=device)[..., :NOPE], kv_b[:, :NOPE]


def _case(num_heads: int, num_tokens: int, *, is_out: bool) -> KernelCase:
    depth, width = (LATENT, V) if is_out else (NOPE, LATENT)
    weight_bytes = num_heads * depth * width * 2

    def setup() -> Prepared:
        torch.manual_seed(num_tokens)
        sets = [_inputs(num_heads, num_tokens, torch.device("cuda"), is_out=is_out) for _ in range(min(64, -(-COLD_BYTES // weight_bytes)))]
        for x, weight in sets:
            x.normal_()
            weight.normal_()
        return Prepared(
            run=lambda config, index: head_product(*sets[index], config=config),
            reference=lambda index: head_product_reference(*sets[index]), num_sets=len(sets), configs=candidates(width, depth),
            peers={"torch.bmm": lambda index: torch.bmm(sets[index][0].transpose(0, 1), sets[index][1])})

    return KernelCase(
        kernel="head_product", shape=f"H {num_heads}, {depth} x {width}, T {num_tokens}",
        num_bytes=weight_bytes + 2 * num_tokens * num_heads * (depth + width), num_flops=2 * num_tokens * num_heads * depth * width,
        rate="bf16", setup=setup, bar="<= 2 us" if num_heads == 16 else "")
