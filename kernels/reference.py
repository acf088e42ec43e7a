"""Every operation in plain torch, on any device: what it means, and what the kernels beside it are tested against.

T tokens of a batch, N decoding sequences, L new tokens of a chunk, H query heads, KV key/value heads, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.plan import Chunk, DecodeGroup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / root mean square over D, times weight [D]. The mean is taken in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_(x: Tensor, rotation: Tensor) -> None:
    """Rotary embedding, in place: each pair (x[2i], x[2i + 1]) is turned by an angle.

    x         [T, H, d]
    rotation  [T, d/2, 2] float32: cosine and sine of the token's angles
    """
    cos, sin = rotation.unsqueeze(1).unbind(-1)
    first, second = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)
    x.copy_(torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2))


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] -> silu(first half) * second half, [T, I]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def route_softmax(logits: Tensor, top_k: int, num_groups: int, groups_per_token: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's choice of experts: softmax scores, the best `top_k` among the groups with the best single expert.

    logits   [T, E] float32
    returns  ids [T, top_k] int64, weights [T, top_k] float32 (scores times scaling_factor, not normalized)
    """
    scores = logits.softmax(-1)
    if num_groups > 1:
        group_scores = torch.unflatten(scores, -1, (num_groups, -1)).amax(-1)
        scores = scores.masked_fill(~_in_best_groups(group_scores, groups_per_token, scores.shape[-1]), 0.0)
    weights, ids = scores.topk(top_k, -1, sorted=False)
    return ids, weights * scaling_factor


def route_noaux(logits: Tensor, bias: Tensor, top_k: int, num_groups: int, groups_per_token: int, scaling_factor: float,
                normalize: bool) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's choice of experts: sigmoid scores; the bias [E] counts for the choice, not for the weight.

    A group's score is the sum of its best two. Shapes as in route_softmax.
    """
    scores = logits.sigmoid()
    for_choice = scores + bias
    group_scores = torch.unflatten(for_choice, -1, (num_groups, -1)).topk(2, -1)[0].sum(-1)
    for_choice = for_choice.masked_fill(~_in_best_groups(group_scores, groups_per_token, scores.shape[-1]), float("-inf"))
    ids = for_choice.topk(top_k, -1, sorted=False)[1]
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling_factor


def _in_best_groups(group_scores: Tensor, groups_per_token: int, num_experts: int) -> Tensor:
    """group_scores [T, G] -> [T, num_experts] bool: whether the expert is in one of the token's best groups."""
    best = group_scores.topk(groups_per_token, -1, sorted=False)[1]
    chosen = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return chosen.repeat_interleave(num_experts // group_scores.shape[1], dim=1)


def fused_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over the token's experts of weight * down(silu(gate(x)) * up(x)).

    x        [T, D]
    gate_up  [E, 2I, D]     down  [E, D, I]
    ids      [T, k] of integers, -1 for none   weights  [T, k] float32
    returns  [T, D]
    """
    top_k = ids.shape[1]
    num_none, *counts = (ids.flatten() + 1).bincount(minlength=gate_up.shape[0] + 1).tolist()
    order = ids.flatten().argsort(stable=True)[num_none:]
    inputs = x[order // top_k]
    outputs = torch.empty_like(inputs)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            outputs[rows] = F.linear(silu_mul(F.linear(inputs[rows], gate_up[expert])), down[expert])
            start += count
    outputs.mul_(weights.flatten()[order].unsqueeze(1))
    by_token = x.new_zeros(ids.numel(), x.shape[1]) if num_none else torch.empty_like(outputs)
    by_token[order] = outputs
    by_choice: Tensor = by_token.unflatten(0, ids.shape)
    return by_choice.sum(1)


def store_gqa(kv: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write new keys and values into one layer's cache.

    kv     [T, 2 * KV, d]           keys, then values
    cache  [2, num_slots, KV, d]
    slots  [T] int64, distinct
    """
    cache.flatten(2).index_copy_(1, slots, kv.flatten(1).unflatten(1, (2, -1)).transpose(0, 1))


def store_mla(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write new latents rows [T, R + rope] into one layer's cache [num_slots, R + rope]; slots [T] int64, distinct."""
    cache.index_copy_(0, slots, rows)


def gqa_decode(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    """One new token per sequence over its paged keys and values; H / KV query heads share a key/value head.

    q        [N, H, d], rotated
    cache    [2, num_slots, KV, d]; slots past a sequence's end are never used
    returns  [N, H, d]
    """
    slots, is_past_end = _padded_slots(group)
    keys, values = (plane[slots].transpose(1, 2) for plane in cache)
    mask = torch.zeros(slots.shape, dtype=q.dtype, device=q.device).masked_fill_(is_past_end, float("-inf"))
    out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask[:, None, None], scale=scale, enable_gqa=True)
    return out.squeeze(2)


def gqa_chunk(q: Tensor, cache: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """The last L tokens of one sequence, each over all tokens up to itself.

    q        [L, H, d], rotated
    cache    [2, num_slots, KV, d]
    returns  [L, H, d]
    """
    keys, values = (plane[chunk.slots].transpose(0, 1).unsqueeze(0) for plane in cache)
    out = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None,
                                         scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def mla_decode(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float, latent_dim: int) -> Tensor:
    """One new token per sequence over the paged latents, which serve as keys and (their first R numbers) as values of all heads.

    q        [N, H, R + rope], W_UK absorbed
    cache    [num_slots, R + rope]; slots past a sequence's end are never used
    returns  [N, H, R], before W_UV
    """
    slots, is_past_end = _padded_slots(group)
    latents = cache[slots]
    scores = (q @ latents.transpose(1, 2)).float() * scale
    scores = scores.masked_fill(is_past_end.unsqueeze(1), float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ latents[..., :latent_dim]


def mla_chunk(q: Tensor, cache: Tensor, chunk: Chunk, kv_b: Tensor, scale: float) -> Tensor:
    """The last L tokens of one sequence, with keys and values of every head decompressed from the latents.

    q        [L, H, nope + rope], rotated
    cache    [num_slots, R + rope]
    kv_b     [H, nope + v, R]: W_UK above W_UV
    returns  [L, H, v]
    """
    num_heads, _, latent_dim = kv_b.shape
    latents, rotated = cache[chunk.slots].tensor_split((latent_dim,), -1)
    nope_dim = q.shape[-1] - rotated.shape[-1]
    per_head = F.linear(latents, kv_b.flatten(0, 1)).view(latents.shape[0], num_heads, -1)
    keys = torch.cat((per_head[..., :nope_dim], rotated.unsqueeze(1).expand(-1, num_heads, -1)), -1)
    out = F.scaled_dot_product_attention(q.transpose(0, 1), keys.transpose(0, 1), per_head[..., nope_dim:].transpose(0, 1),
                                         attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scale)
    return out.transpose(0, 1)


def _padded_slots(group: DecodeGroup) -> tuple[Tensor, Tensor]:
    """Slots [N, S] int64 of every sequence, S that of the longest in whole pages, and where they are past its end [N, S] bool.

    Past the end stands the sequence's own first slot: what another sequence left in a page can never leak in, not even a NaN.
    """
    offsets = torch.arange(group.page_size, device=group.page_table.device)
    slots = (group.page_table.long().unsqueeze(-1) * group.page_size + offsets).flatten(1)
    is_past_end = torch.arange(slots.shape[1], device=slots.device) >= group.seq_lens.unsqueeze(1)
    return torch.where(is_past_end, slots[:, :1], slots), is_past_end
