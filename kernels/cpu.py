"""Operations made fast for CPUs; each means what its namesake in `reference` says.

Decode attention reads the paged cache in place, whatever pages the sequences have. Its trick: with keys as the rows of a table
[num_slots * KV, d], the scores of all sequences and heads are one *sampled* matrix product (q times keys, computed only where a
sparse pattern says), and the output is one weighted *bag* of value rows per sequence and head. Both are single calls that use
all threads; gathering the cache or looping over sequences took 1.5 to 3 times as long.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.plan import DecodeGroup


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate_(x: Tensor, rotation: Tensor) -> None:
    pairs = torch.unflatten(x, -1, (-1, 2))
    if x.dtype != torch.float32 or any(stride % 2 for stride in pairs.stride()[:-1]) or x.storage_offset() % 2:
        reference.rotate_(x, rotation)
        return
    torch.view_as_complex(pairs).mul_(torch.view_as_complex(rotation).unsqueeze(1))


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gqa_decode(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    if q.dtype != torch.float32:  # the sampled product knows no half precision
        return _gqa_decode_by_sequence(q, cache, group, scale)
    num_seqs, num_heads, head_dim = q.shape
    pattern = _pattern(group, num_heads, cache)
    keys, values = cache.view(2, -1, head_dim)
    sampled = torch.sparse.sampled_addmm(pattern.keys, q.reshape(-1, head_dim), keys.t(), beta=0.0, alpha=scale)
    scores = sampled.values().view(num_seqs, num_heads, -1)
    if pattern.mask is not None:
        scores = scores + pattern.mask
    weights = scores.softmax(-1).flatten()
    out = torch.embedding_bag(values, pattern.rows, pattern.bag_starts, False, 0, False, weights)[0]
    return out.view(q.shape)


def mla_decode(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float, latent_dim: int) -> Tensor:
    out = torch.empty(*q.shape[:2], latent_dim, dtype=q.dtype)
    for i, slots in enumerate(group.runs):
        latents = cache[slots]
        weights = (q[i] @ latents.t()).mul_(scale).softmax(-1, dtype=torch.float32)
        torch.mm(weights.to(q.dtype), latents[:, :latent_dim], out=out[i])
    return out


def _gqa_decode_by_sequence(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    out = torch.empty_like(q)
    num_kv_heads = cache.shape[2]
    for i, slots in enumerate(group.runs):
        keys, values = (plane[slots].transpose(0, 1).unsqueeze(0) for plane in cache)
        heads = q[i].view(1, num_kv_heads, -1, q.shape[-1])  # the heads that share keys stand as queries of one head
        out[i] = F.scaled_dot_product_attention(heads, keys, values, scale=scale).view(q.shape[1:])
    return out


@dataclass(slots=True)
class _Pattern:
    """Which key and value rows each sequence and head uses, padded to S tokens; rows are slot * KV + head."""

    keys: Tensor            # sparse [N * H, num_slots * KV] with S entries a row
    rows: Tensor            # its columns, [N * H * S] int32
    bag_starts: Tensor      # [N * H] int32
    mask: Tensor | None     # [N, 1, S]: -inf past a sequence's end; None where all have S tokens


def _pattern(group: DecodeGroup, num_heads: int, cache: Tensor) -> _Pattern:
    num_slots, num_kv_heads = cache.shape[1:3]
    known = group.memo.get((num_heads, num_kv_heads))
    if isinstance(known, _Pattern):
        return known
    slots, is_past_end = reference._padded_slots(group)
    longest = max(group.lens)
    slots, is_past_end = slots[:, :longest], is_past_end[:, :longest]
    num_seqs = len(group.lens)
    heads = torch.arange(num_kv_heads).repeat_interleave(num_heads // num_kv_heads)
    rows = (slots.unsqueeze(1) * num_kv_heads + heads.unsqueeze(1)).flatten().int()
    starts = torch.arange(0, rows.numel() + 1, longest, dtype=torch.int32)
    keys = _sparse(starts, rows, (num_seqs * num_heads, num_slots * num_kv_heads))
    mask = None
    if min(group.lens) < longest:
        mask = torch.zeros(num_seqs, 1, longest).masked_fill_(is_past_end.unsqueeze(1), float("-inf"))
    group.memo[num_heads, num_kv_heads] = pattern = _Pattern(keys, rows, starts[:-1], mask)
    return pattern


def _sparse(row_starts: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(row_starts, columns, torch.zeros(columns.shape), shape, check_invariants=False)


with warnings.catch_warnings():  # torch says once per process that its CSR tensors are in beta
    warnings.simplefilter("ignore", UserWarning)
    _sparse(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), (0, 0))
