"""The operations on a GPU: Triton kernels, and the vendor's library where it is faster."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import MlaWeights
from kernels.block_fp8 import BlockFp8
from kernels.device_plan import DevicePlan
from kernels.experts import make_experts as make_half_experts
from kernels.fp8_experts import make_fp8_experts
from kernels.fp8_linear import Fp8Linear
from kernels.gather_latents import gather_latents
from kernels.gqa_decode import gqa_decode
from kernels.gqa_prefill import gqa_prefill
from kernels.gqa_store import gqa_rope_store
from kernels.linear import Linear, plain_linear
from kernels.mla_decode import mla_decode
from kernels.mla_prefill import mla_prefill
from kernels.mla_store import mla_norm_rope_store
from kernels.norm import add_rms_norm, rms_norm
from kernels.ops import Experts, Ops, Routing
from kernels.plan import Rotary
from kernels.routing import route as route_kernel
from kernels.silu_mul import silu_mul


def make_linear(weight: Tensor | BlockFp8, bias: Tensor | None) -> Linear:
    if isinstance(weight, BlockFp8):
        return Fp8Linear(weight, bias)
    return plain_linear(weight, bias)


def make_head(weight: Tensor) -> Linear:
    transposed = weight.t()
    if weight.dtype == torch.float32:
        return lambda x: torch.mm(x, transposed)
    return lambda x: torch.mm(x, transposed, out_dtype=torch.float32)


def make_router(weight: Tensor) -> Linear:
    """Products of 16-bit numbers are exact in float32: where the weight is one of bfloat16, nothing is lost by leaving it so."""
    narrow = weight.to(torch.bfloat16)
    if not torch.equal(narrow.float(), weight):
        return lambda x: F.linear(x.float(), weight)
    transposed = narrow.t()
    return lambda x: torch.mm(x, transposed, out_dtype=torch.float32) if x.dtype == torch.bfloat16 else F.linear(x.float(), weight)


def make_experts(gate_up: Tensor | BlockFp8, down: Tensor | BlockFp8) -> Experts:
    if isinstance(gate_up, BlockFp8) and isinstance(down, BlockFp8):
        return make_fp8_experts(gate_up, down)
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    return make_half_experts(gate_up, down)


def route(logits: Tensor, routing: Routing, num_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return route_kernel(logits, routing.bias, top_k=routing.top_k, num_groups=routing.num_groups,
                        groups_per_token=routing.groups_per_token, scaling_factor=routing.scaling_factor, normalize=routing.normalize,
                        num_shared=routing.num_shared, num_valid=num_valid)


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
        absorbed = torch.empty(num_decodes, num_heads, latent_dim, dtype=q.dtype, device=q.device)
        torch.bmm(nope.transpose(0, 1), weights.w_uk, out=absorbed.transpose(0, 1))
        attended = mla_decode(absorbed, rotated, cache, plan.page_table, plan.seq_lens, plan.schedule, scale, plan.page_size)
        torch.bmm(attended.transpose(0, 1), weights.w_uv.transpose(1, 2), out=out[:num_decodes].transpose(0, 1))
    for part in plan.chunks:
        latents = gather_latents(cache, part.page_table, part.cu_k, part.num_keys, part.max_k, plan.page_size)
        kv = torch.mm(latents[:, :latent_dim], weights.kv_b.view(-1, latent_dim).t()).view(part.num_keys, num_heads, per_head)
        mla_prefill(q[part.start : part.end], kv, latents[:, latent_dim:], part.cu_q, part.cu_k, part.max_q, scale,
                    out=out[part.start : part.end])
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
