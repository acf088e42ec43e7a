"""What stands between the q/k/v product of grouped-query attention and the attention itself, in one launch.

    heads  [ q x H | k x KV | v x KV ]    q and k rotated in place; k (rotated) and v -> the token's slot in the cache
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import rotate_
from kernels.rotate import rotate_pairs


@dataclass(frozen=True, slots=True)
class Config:
    block_h: int       # heads of one program
    num_warps: int


FEW_TOKENS = 256


def config_for(num_tokens: int, head_dim: int) -> Config:
    """A program takes 1 K numbers of few tokens, 2 K of many."""
    numbers = 1024 if num_tokens < FEW_TOKENS else 2048
    return Config(block_h=max(1, numbers // triton.next_power_of_2(head_dim)), num_warps=4)


def gqa_rope_store(heads: Tensor, rotations: Tensor, positions: Tensor, slots: Tensor, cache: Tensor, num_heads: int, *,
                   config: Config | None = None) -> None:
    """Rotate query and key heads in place, over all d dimensions; store keys and values in the cache.

    heads      [T, H + 2 KV, d]: q, k, v; rows may be strided
    rotations  [max_position, d / 2, 2] float32: cosine and sine
    positions  [T] int64, 0 in padding rows
    slots      [T] int64, distinct; -1 marks a padding row: nothing of it is stored
    cache      [2, num_slots, KV, d]: keys, values
    num_heads  H

    Raises ValueError for other shapes. Source: RoFormer, arXiv 2104.09864.
    """
    num_tokens, num_all, head_dim = heads.shape
    num_kv = cache.shape[2]
    if num_all != num_heads + 2 * num_kv or cache.shape[3] != head_dim or rotations.shape[1] * 2 != head_dim \
            or heads.stride()[1:] != (head_dim, 1) or not cache.is_contiguous() or not rotations.is_contiguous() \
            or positions.shape != slots.shape:
        raise ValueError(f"gqa_rope_store: heads {tuple(heads.shape)}, {num_heads} of them queries, rotations {tuple(rotations.shape)}, "
                         f"cache {tuple(cache.shape)}")
    config = config or config_for(num_tokens, head_dim)
    _gqa_store_kernel[(num_tokens, triton.cdiv(num_all, config.block_h))](
        heads, rotations, positions, slots, cache, heads.stride(0), cache.stride(0), NUM_HEADS=num_heads, NUM_KV=num_kv, DIM=head_dim,
        BLOCK_H=config.block_h, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=config.num_warps)


def gqa_rope_store_reference(heads: Tensor, rotations: Tensor, positions: Tensor, slots: Tensor, cache: Tensor, num_heads: int) -> None:
    """As gqa_rope_store."""
    num_kv = cache.shape[2]
    rotate_(heads[:, : num_heads + num_kv], rotations[positions])
    is_real = slots >= 0
    cache[:, slots[is_real]] = torch.unflatten(heads[is_real, num_heads:], 1, (2, num_kv)).transpose(0, 1)


@triton.jit
def _gqa_store_kernel(heads, rotations, positions, slots, cache, token_stride, plane_stride, NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr,
                  DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    is_column = column < DIM
    is_inside = (head < NUM_HEADS + 2 * NUM_KV) & is_column
    is_rotated = head < NUM_HEADS + NUM_KV
    position, slot = tl.load(positions + token), tl.load(slots + token)
    in_heads = heads + token * token_stride + head * DIM + column
    x = tl.load(in_heads, mask=is_inside, other=0.0).to(tl.float32)
    rotation = tl.load(rotations + position * DIM + column, mask=is_column, other=0.0)
    rotated = tl.where(is_rotated, rotate_pairs(x, rotation, BLOCK_H, BLOCK_D), x)
    tl.store(in_heads, rotated, mask=is_inside & is_rotated)
    plane = tl.where(is_rotated, 0, plane_stride)
    row = slot * NUM_KV + head - tl.where(is_rotated, NUM_HEADS, NUM_HEADS + NUM_KV)
    # A padding row's slot is -1, so its rows are negative (asked of the block: the interpreter widens a scalar truth to int32).
    tl.store(cache + plane + row * DIM + column, rotated, mask=is_inside & (head >= NUM_HEADS) & (row >= 0))
