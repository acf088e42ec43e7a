"""Norms, rotations, stores and gates: the launches between the matrix products. All are bound by memory, or by the launch itself.

Decoding finds its inputs in the L2 cache, where the kernel before has left them, so those cases rotate between two small input sets;
prefill does not, and its sets are larger than the cache together. The kernels that work in place are given inputs that they
leave as they are (rotations by nothing, additions below the rounding), so that every run gives the same; tests check the rest.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_case import KernelCase, Prepared
from kernels import gqa_store, mla_store, norm, reference, silu_mul

EPS = 1e-6
MANY_TOKENS = 1024
COLD_BYTES = 200 << 20       # between two uses of one input set: three times the L2 cache
LATENT, ROPE, NOPE = 512, 64, 128
HALF = torch.bfloat16
GPU = torch.device("cuda")
V2_LITE, V3 = "V2-Lite", "V3"
HEADS, HIDDEN = {V2_LITE: 16, V3: 128}, {V2_LITE: 2048, V3: 7168}


def cases() -> list[KernelCase]:
    return [
        *(_add_norm(model, tokens, parts) for model, tokens, parts in (
            (V2_LITE, 1, 1), (V2_LITE, 1, 8), (V2_LITE, 64, 8), (V2_LITE, 256, 8), (V2_LITE, 8192, 1), (V2_LITE, 8192, 8),
            (V3, 1, 1), (V3, 128, 9), (V3, 4096, 9))),
        *(_norm(dim, tokens) for dim, tokens in ((2048, 1), (2048, 8192), (1536, 128), (4096, 8192), (7168, 4096))),
        *(_mla(model, tokens) for model, tokens in ((V2_LITE, 1), (V2_LITE, 128), (V2_LITE, 8192), (V3, 1), (V3, 128), (V3, 4096))),
        *(_gqa(tokens) for tokens in (1, 128, 8192)),
        *(_silu(inner, tokens) for inner, tokens in ((10944, 1), (10944, 128), (10944, 8192), (2816, 64), (18432, 4096))),
    ]


def offline_calls() -> list[Callable[[], object]]:
    cpu = torch.device("cpu")
    wide = torch.empty(8, 7168, dtype=HALF)
    return [
        lambda: norm.rms_norm(wide, wide[0], EPS),
        lambda: norm.add_rms_norm(torch.empty(8, 6, 2048, dtype=HALF), torch.empty(8, 2048, dtype=HALF), wide[0, :2048], EPS),
        lambda: norm.add_rms_norm(torch.empty(512, 9, 7168, dtype=HALF), torch.empty(512, 7168, dtype=HALF), wide[0], EPS),
        lambda: mla_store.mla_norm_rope_store(*_mla_inputs(16, 8, 64, cpu)),
        lambda: mla_store.mla_norm_rope_store(*_mla_inputs(128, 512, 512, cpu)),
        lambda: gqa_store.gqa_rope_store(*_gqa_inputs(8, 64, cpu)),
        lambda: silu_mul.silu_mul(torch.empty(8, 2 * 10944, dtype=HALF)),
    ]


def _case(kernel: str, shape: str, tokens: int, num_bytes: int, make: Callable[[], Any], run: Callable[..., Tensor],
          expected: Callable[..., Tensor], configs: list[Any], peers: dict[str, Callable[..., object]] | None = None) -> KernelCase:
    """`make` gives one input set, which the others are called with."""
    is_decode = tokens < MANY_TOKENS

    def setup() -> Prepared:
        sets = [make() for _ in range(2 if is_decode else max(2, -(-COLD_BYTES // num_bytes)))]

        def on_set(call: Callable[..., object], index: int) -> object:
            return call(*sets[index])

        return Prepared(run=lambda config, index: run(*sets[index], config=config), reference=lambda index: expected(*sets[index]),
                        num_sets=len(sets), configs=configs,
                        peers={name: partial(on_set, peer) for name, peer in (peers or {}).items()})

    bar = "<= 2 us" if tokens == 1 else "" if is_decode else ">= 2,400 GB/s"
    return KernelCase(kernel=kernel, shape=shape, num_bytes=num_bytes, num_flops=0, rate="fp32", setup=setup, bar=bar)


def _fits(numbers: int, num_warps: int) -> bool:
    """Between two and 64 numbers for each thread."""
    return 2 <= numbers / (32 * num_warps) <= 64


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=HALF, device=GPU) * scale


# ---- norms ----


def _norm_configs(dim: int) -> list[Any]:
    return [norm.Config(num_warps=num_warps) for num_warps in (1, 2, 4, 8, 16, 32) if _fits(dim, num_warps)]


def _norm(dim: int, tokens: int) -> KernelCase:
    def peer(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    return _case("norm", f"D {dim}, T {tokens}", tokens, 4 * tokens * dim, lambda: (_normal(tokens, dim), _normal(dim)),
                 lambda x, weight, config: norm.rms_norm(x, weight, EPS, config=config),
                 lambda x, weight: reference.rms_norm(x.float(), weight.float(), EPS), _norm_configs(dim),
                 {"torch": peer})


def _add_norm(model: str, tokens: int, parts: int) -> KernelCase:
    dim = HIDDEN[model]

    def peer(delta: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        residual += delta.sum(1)
        return F.rms_norm(residual, weight.shape, weight, EPS)

    def expected(delta: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm(residual.float() + delta.sum(1, dtype=torch.float32), weight.float(), EPS)

    return _case("norm", f"add {parts} rows, D {dim}, T {tokens}", tokens, 2 * tokens * dim * (parts + 3),
                 lambda: (_normal(tokens, parts, dim, scale=1e-6), _normal(tokens, dim), _normal(dim)),
                 lambda delta, residual, weight, config: norm.add_rms_norm(delta, residual, weight, EPS, config=config),
                 expected, _norm_configs(dim), {"torch": peer})


# ---- stores ----


def _still(max_position: int, dim: int, device: torch.device) -> Tensor:
    """Rotations by nothing, as many as there are positions: the same traffic as real ones, and the same result however often."""
    return torch.tensor([1.0, 0.0], device=device).expand(max_position, dim // 2, 2).contiguous()


def _places(tokens: int, num_slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens, device=device), torch.randperm(num_slots, device=device)[:tokens]


def _widened(inputs: tuple[Any, ...]) -> list[Any]:
    return [each.float() if isinstance(each, Tensor) and each.dtype == HALF else each for each in inputs]


def _mla_inputs(num_heads: int, tokens: int, num_slots: int, device: torch.device) -> tuple[Any, ...]:
    q_width = num_heads * (NOPE + ROPE)
    product = torch.randn(tokens, q_width + LATENT + ROPE, dtype=HALF, device=device)
    weight = torch.ones(LATENT, dtype=HALF, device=device)
    cache = torch.zeros(num_slots, LATENT + ROPE, dtype=HALF, device=device)
    return (torch.unflatten(product[:, :q_width], 1, (num_heads, -1)), product[:, q_width:], weight, EPS, _still(tokens, ROPE, device),
            *_places(tokens, num_slots, device), cache)


def _mla(model: str, tokens: int) -> KernelCase:
    num_heads, num_slots = HEADS[model], tokens + 64

    def run(*inputs: Any, config: mla_store.Config | None) -> Tensor:
        mla_store.mla_norm_rope_store(*inputs, config=config)
        return inputs[-1]  # type: ignore[no-any-return]

    def expected(*inputs: Any) -> Tensor:
        wide = _widened(inputs)
        mla_store.mla_norm_rope_store_reference(*wide)
        return wide[-1]  # type: ignore[no-any-return]

    num_bytes = tokens * (4 * num_heads * ROPE + 4 * (LATENT + ROPE) + 4 * ROPE + 16)
    configs = [mla_store.Config(block_h=block_h, num_warps=num_warps) for block_h in (2, 4, 8, 16, 32, 64, 128) if block_h <= num_heads
               for num_warps in (1, 2, 4, 8) if _fits(block_h * ROPE, num_warps)]
    return _case("mla_store", f"{model}, T {tokens}", tokens, num_bytes, partial(_mla_inputs, num_heads, tokens, num_slots, GPU), run,
                 expected, configs)


def _gqa_inputs(tokens: int, num_slots: int, device: torch.device, num_heads: int = 32, num_kv: int = 8, dim: int = 128) -> tuple[Any, ...]:
    heads = torch.randn(tokens, num_heads + 2 * num_kv, dim, dtype=HALF, device=device)
    cache = torch.zeros(2, num_slots, num_kv, dim, dtype=HALF, device=device)
    return heads, _still(tokens, dim, device), *_places(tokens, num_slots, device), cache, num_heads


def _gqa(tokens: int) -> KernelCase:
    def run(*inputs: Any, config: gqa_store.Config | None) -> Tensor:
        gqa_store.gqa_rope_store(*inputs, config=config)
        return inputs[-2]  # type: ignore[no-any-return]

    def expected(*inputs: Any) -> Tensor:
        wide = _widened(inputs)
        gqa_store.gqa_rope_store_reference(*wide)
        return wide[-2]  # type: ignore[no-any-return]

    num_bytes = tokens * 128 * (2 * 40 * 2 + 2 * 8 + 2 * 16 + 4)  # q and k in place, v read, both stored; the rotations
    configs = [gqa_store.Config(block_h=block_h, num_warps=num_warps) for block_h in (2, 4, 8, 16, 32, 64) for num_warps in (1, 2, 4, 8)
               if _fits(block_h * 128, num_warps)]
    return _case("gqa_store", f"32 + 8 heads of 128, T {tokens}", tokens, num_bytes, partial(_gqa_inputs, tokens, tokens + 64, GPU), run,
                 expected, configs)


# ---- gates ----


def _silu(inner: int, tokens: int) -> KernelCase:
    configs = [silu_mul.Config(block=block, num_warps=num_warps) for block in (128, 256, 512, 1024, 2048, 4096)
               for num_warps in (1, 2, 4, 8) if 2 <= block // (32 * num_warps) <= 32]
    return _case("silu_mul", f"I {inner}, T {tokens}", tokens, 6 * tokens * inner, lambda: (_normal(tokens, 2 * inner),),
                 lambda gate_up, config: silu_mul.silu_mul(gate_up, config=config), lambda gate_up: reference.silu_mul(gate_up.float()),
                 configs, {"torch": reference.silu_mul})
