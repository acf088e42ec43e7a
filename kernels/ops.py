"""The operations that models are made of, one table of them per kind of device. Looked up once, when a model is built.

The table for GPUs is made of Triton kernels and stands in `kernels.cuda`, which is imported only where it is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, linear, reference
from kernels.attention import MlaWeights, make_add_rms_norm, make_attend_gqa, make_attend_mla, make_store_gqa, make_store_mla
from kernels.linear import Linear
from kernels.plan import Rotary


@dataclass(frozen=True, slots=True)
class Routed:
    """The experts of each token: ids [T, k], weights [T, k] float32. `aligned`: the ids sorted as the device's experts want them."""

    ids: Tensor
    weights: Tensor
    aligned: Any = None


@dataclass(frozen=True, slots=True)
class Experts:
    """run      (x [T, D], routed) -> [T, D], or [T, k, D] to be summed over k; an id of -1 chooses none
    block_m  (T, k) -> in blocks of how many rows they want the ids sorted; None: as they are
    weights  all that `run` reads of the experts, each [E, ...]: overwritten in place where experts move
    """

    run: Callable[[Tensor, Routed], Tensor]
    block_m: Callable[[int, int], int] | None = None
    weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts are chosen. `bias` [E] or None: the choice of DeepSeek-V3 or of V2 (`reference.route_…`).

    `num_shared` shared experts stand behind the E routed ones as experts that every token visits with weight 1. `block_m` is that of
    the experts.
    """

    top_k: int
    num_groups: int
    groups_per_token: int
    scaling_factor: float
    normalize: bool
    bias: Tensor | None
    num_shared: int = 0
    block_m: Callable[[int, int], int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One implementation of each operation. What they mean stands in `kernels.reference`, what a batch of them means here.

    make_linear   (weight, bias) -> x [..., K] -> [..., N]; a weight may be fp8 in blocks where the device takes that
    make_head     the same for the output projection: float32 logits
    make_router   gate weight [E, D] float32 -> x -> logits [T, E] float32, whatever the type of x; or what `route` takes for them
    make_experts  (gate_up [E, 2I, D], down [E, D, I]) -> Experts
    add_rms_norm  (delta [T, D] or [T, k, D], residual [T, D], weight, eps): residual += delta, summed over k; returns its norm
    store_mla     (q [T, H, nope + rope], latent [T, R + rope], norm weight [R], eps, rotary, slots, cache): rotates q in place, norms
                  and rotates the latents into the cache
    store_gqa     (heads [T, H + 2 KV, d]: q, k, v; rotary, slots, cache, H): rotates q and k in place, stores k and v
    attend_…      (q [T, H, ...], cache, plan of the batch, ...) -> [T, H, v]; q's nope part may be left changed
    route         (logits, routing, number of real rows or None) -> Routed
    """

    make_linear: Callable[[Any, Tensor | None], Linear] = linear.plain_linear
    make_head: Callable[[Tensor], Linear]
    make_router: Callable[[Tensor], Linear]
    make_experts: Callable[[Any, Any], Experts]
    has_shared_experts: bool = False        # its experts take shared ones along
    keeps_fp8: bool = False                 # its products and experts take fp8 weights as they are stored
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    store_mla: Callable[[Tensor, Tensor, Tensor, float, Rotary, Tensor, Tensor], None]
    store_gqa: Callable[[Tensor, Rotary, Tensor, Tensor, int], None]
    attend_mla: Callable[[Tensor, Tensor, Any, MlaWeights, float], Tensor]
    attend_gqa: Callable[[Tensor, Tensor, Any, float], Tensor]
    route: Callable[[Tensor, Routing, Tensor | None], Routed]


def ops_for(device: torch.device) -> Ops:
    if device.type == "cuda":
        from kernels.cuda import CUDA

        return CUDA
    return CPU if device.type == "cpu" else PLAIN


def _route(logits: Tensor, routing: Routing, num_valid: Tensor | None) -> Routed:
    assert num_valid is None and routing.num_shared == 0
    common = routing.top_k, routing.num_groups, routing.groups_per_token, routing.scaling_factor
    if routing.bias is None:
        return Routed(*reference.route_softmax(logits, *common))
    return Routed(*reference.route_noaux(logits, routing.bias, *common, routing.normalize))


def _make_experts(gate_up: Tensor, down: Tensor) -> Experts:
    return Experts(lambda x, routed: reference.fused_experts(x, gate_up, down, routed.ids, routed.weights), weights=(gate_up, down))


def _make_router(weight: Tensor) -> Linear:
    return lambda x: F.linear(x.float(), weight)


def _float_head(make_linear: Callable[[Tensor, Tensor | None], Linear]) -> Callable[[Tensor], Linear]:
    def make_head(weight: Tensor) -> Linear:
        product = make_linear(weight, None)
        return lambda x: product(x).float()

    return make_head


PLAIN = Ops(
    make_head=_float_head(linear.plain_linear), make_router=_make_router, make_experts=_make_experts, route=_route,
    rms_norm=reference.rms_norm, add_rms_norm=make_add_rms_norm(reference.rms_norm), silu_mul=reference.silu_mul,
    store_mla=make_store_mla(reference.rms_norm, reference.rotate_, reference.store_mla),
    store_gqa=make_store_gqa(reference.rotate_, reference.store_gqa),
    attend_mla=make_attend_mla(reference.mla_decode, reference.mla_chunk),
    attend_gqa=make_attend_gqa(reference.gqa_decode, reference.gqa_chunk))
CPU = Ops(
    make_linear=linear.cpu_linear, make_head=_float_head(linear.cpu_linear), make_router=_make_router, make_experts=_make_experts,
    route=_route, rms_norm=cpu.rms_norm, add_rms_norm=make_add_rms_norm(cpu.rms_norm), silu_mul=cpu.silu_mul,
    store_mla=make_store_mla(cpu.rms_norm, cpu.rotate_, reference.store_mla), store_gqa=make_store_gqa(cpu.rotate_, reference.store_gqa),
    attend_mla=make_attend_mla(cpu.mla_decode, reference.mla_chunk), attend_gqa=make_attend_gqa(cpu.gqa_decode, reference.gqa_chunk))
