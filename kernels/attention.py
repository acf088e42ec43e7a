"""Attention of a whole batch from operations on its parts, as `make_plan` splits it: the form for devices without fused kernels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.plan import AttentionPlan, Chunk, DecodeGroup, Rotary


@dataclass(frozen=True, slots=True)
class MlaWeights:
    """W_UK above W_UV for each head, as one tensor and as views of it."""

    kv_b: Tensor   # [H, nope + v, R]
    w_uk: Tensor   # [H, nope, R]
    w_uv: Tensor   # [H, v, R]

    @classmethod
    def split(cls, kv_b: Tensor, nope_dim: int) -> "MlaWeights":
        w_uk, w_uv = kv_b.tensor_split((nope_dim,), 1)
        return cls(kv_b, w_uk, w_uv)


RmsNorm = Callable[[Tensor, Tensor, float], Tensor]
Rotate = Callable[[Tensor, Tensor], None]


def make_add_rms_norm(rms_norm: RmsNorm) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += delta if delta.dim() == 2 else delta.float().sum(1)
        return rms_norm(residual, weight, eps)

    return add_rms_norm


def make_store_mla(rms_norm: RmsNorm, rotate_: Rotate, store: Callable[[Tensor, Tensor, Tensor], None],
                   ) -> Callable[[Tensor, Tensor, Tensor, float, Rotary, Tensor, Tensor], None]:
    def store_mla(q: Tensor, latent: Tensor, norm_weight: Tensor, eps: float, rotary: Rotary, slots: Tensor, cache: Tensor) -> None:
        latent_dim = norm_weight.shape[0]
        rotated = latent[:, latent_dim:]
        rotate_(q[..., q.shape[-1] - rotated.shape[-1] :], rotary.by_token)
        rotate_(rotated.unsqueeze(1), rotary.by_token)
        store(torch.cat((rms_norm(latent[:, :latent_dim], norm_weight, eps), rotated), -1), cache, slots)

    return store_mla


def make_store_gqa(rotate_: Rotate,
                   store: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[Tensor, Rotary, Tensor, Tensor, int], None]:
    def store_gqa(heads: Tensor, rotary: Rotary, slots: Tensor, cache: Tensor, num_heads: int) -> None:
        rotate_(heads[:, : num_heads + cache.shape[2]], rotary.by_token)
        store(heads[:, num_heads:], cache, slots)

    return store_gqa


def make_attend_gqa(decode: Callable[[Tensor, Tensor, DecodeGroup, float], Tensor],
                    prefill: Callable[[Tensor, Tensor, Chunk, float], Tensor]) -> Callable[[Tensor, Tensor, AttentionPlan, float], Tensor]:
    def attend_gqa(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        if plan.groups and plan.groups[0].rows is None:
            return decode(q, cache, plan.groups[0], scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in plan.groups:
            out[group.rows] = decode(q[group.rows], cache, group, scale)
        for chunk in plan.chunks:
            out[chunk.start : chunk.end] = prefill(q[chunk.start : chunk.end], cache, chunk, scale)
        return out

    return attend_gqa


def make_attend_mla(decode: Callable[[Tensor, Tensor, DecodeGroup, float, int], Tensor],
                    prefill: Callable[[Tensor, Tensor, Chunk, Tensor, float], Tensor],
                    ) -> Callable[[Tensor, Tensor, AttentionPlan, MlaWeights, float], Tensor]:
    def attend_mla(q: Tensor, cache: Tensor, plan: AttentionPlan, weights: MlaWeights, scale: float) -> Tensor:
        latent_dim = weights.kv_b.shape[2]
        out = torch.empty(*q.shape[:2], weights.w_uv.shape[1], dtype=q.dtype, device=q.device)
        for group in plan.groups:
            rows = slice(None) if group.rows is None else group.rows
            nope, rotated = q[rows].tensor_split((weights.w_uk.shape[1],), -1)
            absorbed = torch.bmm(nope.transpose(0, 1), weights.w_uk).transpose(0, 1)            # [N, H, R]
            attended = decode(torch.cat((absorbed, rotated), -1), cache, group, scale, latent_dim)
            out[rows] = torch.bmm(attended.transpose(0, 1), weights.w_uv.transpose(1, 2)).transpose(0, 1)
        for chunk in plan.chunks:
            out[chunk.start : chunk.end] = prefill(q[chunk.start : chunk.end], cache, chunk, weights.kv_b, scale)
        return out

    return attend_mla
