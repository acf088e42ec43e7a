"""The operations on a GPU: Triton kernels, and the vendor's library where it is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import experts as half
from kernels import fp8_experts as fp8
from kernels import router, skinny_linear
from kernels.align import allocate
from kernels.attention import MlaWeights
from kernels.block_fp8 import BlockFp8
from kernels.combined_product import combined_product
from kernels.device_plan import DevicePlan
from kernels.fp8_linear import Fp8Linear
from kernels.gather_latents import gather_latents
from kernels.gqa_decode import gqa_decode
from kernels.gqa_prefill import gqa_prefill
from kernels.gqa_store import gqa_rope_store
from kernels.head_product import MOST_TOKENS as MOST_BY_HEADS
from kernels.head_product import head_product
from kernels.linear import Linear, plain_linear
from kernels.mla_decode import mla_decode, mla_decode_parts
from kernels.mla_prefill import mla_prefill
from kernels.mla_store import mla_norm_rope_store
from kernels.norm import add_rms_norm, rms_norm
from kernels.ops import Experts, Ops, Routed, Routing
from kernels.plan import Rotary
from kernels.routing import route as route_kernel
from kernels.silu_mul import silu_mul


def make_linear(weight: Tensor | BlockFp8, bias: Tensor | None) -> Linear:
    if isinstance(weight, BlockFp8):
        return Fp8Linear(weight, bias)
    return _skinny_or(plain_linear(weight, bias), weight, bias, weight.dtype)


def make_head(weight: Tensor) -> Linear:
    transposed = weight.t()
    if weight.dtype == torch.float32:
        return lambda x: torch.mm(x, transposed)
    return _skinny_or(lambda x: torch.mm(x, transposed, out_dtype=torch.float32), weight, None, torch.float32)


def _skinny_or(product: Linear, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Linear:
    """`product`, but the kernel for few rows where this weight's table has a config for them."""
    table = skinny_linear.table_for(weight)
    if not table or weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return product

    def linear(x: Tensor) -> Tensor:
        config = skinny_linear.config_for(x.shape[0], table)
        if config is None:
            return product(x)
        return skinny_linear.skinny_linear(x, weight, bias, out_dtype=out_dtype, config=config)

    return linear


def make_router(weight: Tensor) -> Linear:
    """Products of 16-bit numbers are exact in float32: where the weight is one of bfloat16, nothing is lost by leaving it so."""
    narrow = weight.to(torch.bfloat16)
    if not torch.equal(narrow.float(), weight):
        return lambda x: F.linear(x.float(), weight)
    transposed = narrow.t()

    def product(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return F.linear(x.float(), weight)
        return router.router(x, narrow) if x.shape[0] <= router.MOST_TOKENS else torch.mm(x, transposed, out_dtype=torch.float32)

    return product


def make_experts(gate_up: Tensor | BlockFp8, down: Tensor | BlockFp8) -> Experts:
    num_experts, hidden_size, inner = down.shape
    if isinstance(gate_up, BlockFp8) and isinstance(down, BlockFp8):
        return Experts(
            lambda x, routed: fp8.fp8_experts(x, gate_up, down, routed.ids, routed.weights, aligned=routed.aligned),
            lambda num_tokens, num_chosen: fp8.config_for(num_tokens * num_chosen, num_experts).block_m,
            (gate_up.data, gate_up.scale, down.data, down.scale))
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    packed = half.pack_gate_up(gate_up)
    return Experts(
        lambda x, routed: half.experts(x, packed, down, routed.ids, routed.weights, aligned=routed.aligned),
        lambda num_tokens, _: half.config_for(num_tokens, hidden_size, inner).block_m, (packed, down))


def route(logits: Tensor, routing: Routing, num_valid: Tensor | None) -> Routed:
    """Sorted by expert too. logits [T, E], or parts of them [S, T, E]."""
    num_tokens, num_experts = logits.shape[-2:]
    num_chosen = routing.top_k + routing.num_shared
    aligned = None
    if routing.block_m is not None:
        block_m = routing.block_m(num_tokens, num_chosen)
        aligned = allocate(num_tokens * num_chosen, num_experts + routing.num_shared, block_m, logits.device)
    ids, weights = route_kernel(
        logits, routing.bias, top_k=routing.top_k, num_groups=routing.num_groups, groups_per_token=routing.groups_per_token,
        scaling_factor=routing.scaling_factor, normalize=routing.normalize, num_shared=routing.num_shared, num_valid=num_valid,
        aligned=aligned)
    return Routed(ids, weights, aligned)


def store_mla(q: Tensor, latent: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, slots: Tensor, cache: Tensor) -> None:
    mla_norm_rope_store(q, latent, norm_weight, eps, rotary.table, rotary.positions, slots, cache)


def store_gqa(heads: Tensor, rotary: Rotary, slots: Tensor, cache: Tensor, num_heads: int) -> None:
    gqa_rope_store(heads, rotary.table, rotary.positions, slots, cache, num_heads)


def attend_mla(q: Tensor, cache: Tensor, plan: DevicePlan, weights: MlaWeights, scale: float) -> Tensor:
    """Decodes on the latents themselves, chunks on keys and values decompressed from them."""
    num_heads, per_head, latent_dim = weights.kv_b.shape
    num_decodes = plan.num_decodes
    out = torch.empty(q.shape[0], num_heads, weights.w_uv.shape[1], dtype=q.dtype, device=q.device)
    if num_decodes:
        nope, rotated = q[:num_decodes].tensor_split((weights.w_uk.shape[1],), -1)
        absorbed, w_uv = _by_heads(nope, weights.w_uk), weights.w_uv.transpose(1, 2)
        inputs = absorbed, rotated, cache, plan.page_table, plan.seq_lens, plan.schedule, scale, plan.page_size
        if num_decodes <= MOST_BY_HEADS:
            combined_product(*mla_decode_parts(*inputs, is_settled=True), plan.seq_lens, plan.schedule, w_uv, out[:num_decodes])
        else:
            _by_heads(mla_decode(*inputs, is_settled=True), w_uv, out[:num_decodes])
    for part in plan.chunks:
        latents = gather_latents(cache, part.page_table, part.cu_k, part.num_keys, part.max_k, plan.page_size)
        kv = torch.mm(latents[:, :latent_dim], weights.kv_b.view(-1, latent_dim).t()).view(part.num_keys, num_heads, per_head)
        mla_prefill(q[part.start : part.end], kv, latents[:, latent_dim:], part.cu_q, part.cu_k, part.max_q, scale,
                    out=out[part.start : part.end])
    return out


def _by_heads(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, H, K] by weight [H, K, N] -> [T, H, N]"""
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    if x.shape[0] <= MOST_BY_HEADS:
        return head_product(x, weight, out=out)
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def attend_gqa(q: Tensor, cache: Tensor, plan: DevicePlan, scale: float) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.num_decodes:
        gqa_decode(q[: plan.num_decodes], cache, plan.page_table, plan.seq_lens, plan.schedule, scale, plan.page_size,
                   out=out[: plan.num_decodes])
    for part in plan.chunks:
        gqa_prefill(q[part.start : part.end], cache, part.page_table, part.cu_q, part.seq_lens, part.max_q, scale, plan.page_size,
                    out=out[part.start : part.end])
    return out


CUDA = Ops(
    make_linear=make_linear, make_head=make_head, make_router=make_router, make_experts=make_experts, has_shared_experts=True,
    keeps_fp8=True, route=route, rms_norm=rms_norm, add_rms_norm=add_rms_norm, silu_mul=silu_mul, store_mla=store_mla,
    store_gqa=store_gqa, attend_mla=attend_mla, attend_gqa=attend_gqa)
