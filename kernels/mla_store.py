"""What stands between the first product of latent attention and the attention itself, in one launch.

    q       [ nope | rope ] x heads    rope part rotated in place
    latent  [ R | rope ]               -> [ norm(R) | rotated ] -> the token's slot in the cache
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, wait_for_earlier
from kernels.norm import normed
from kernels.reference import rms_norm, rotate_
from kernels.rotate import rotate_pairs


@dataclass(frozen=True, slots=True)
class Config:
    block_h: int       # heads of one program; a token's first program stores its latent too
    num_warps: int


FEW_TOKENS = 256


def config_for(num_tokens: int, num_heads: int) -> Config:
    if num_tokens < FEW_TOKENS:
        return Config(block_h=min(triton.next_power_of_2(num_heads), 16), num_warps=4)
    return Config(block_h=min(triton.next_power_of_2(num_heads), 32), num_warps=4)


def mla_norm_rope_store(q: Tensor, latent: Tensor, norm_weight: Tensor, eps: float, rotations: Tensor, positions: Tensor, slots: Tensor,
                        cache: Tensor, *, config: Config | None = None) -> None:
    """Rotate q's rope part in place; norm and rotate the latent into the cache. `latent` itself stays as it is.

    q            [T, H, nope + rope], strided except for the last dimension
    latent       [T, R + rope], rows may be strided; R and rope are powers of two
    norm_weight  [R]
    rotations    [max_position, rope / 2, 2] float32: cosine and sine
    positions    [T] int64, 0 in padding rows
    slots        [T] int64, distinct; -1 marks a padding row: nothing of it is stored
    cache        [num_slots, R + rope]

    Raises ValueError for other shapes. Source: DeepSeek-V2 paper, 2.1.
    """
    num_tokens, num_heads, head_dim = q.shape
    latent_dim, rope = norm_weight.shape[0], 2 * rotations.shape[1]
    if latent.shape != (num_tokens, latent_dim + rope) or cache.shape[1] != latent_dim + rope or rope > head_dim \
            or q.stride(2) != 1 or latent.stride(1) != 1 or not cache.is_contiguous() or not rotations.is_contiguous() \
            or positions.shape != slots.shape:
        raise ValueError(f"mla_norm_rope_store: q {tuple(q.shape)}, latent {tuple(latent.shape)}, norm_weight {latent_dim}, "
                         f"rotations {tuple(rotations.shape)}, cache {tuple(cache.shape)}")
    config = config or config_for(num_tokens, num_heads)
    _mla_store_kernel[(num_tokens, triton.cdiv(num_heads, config.block_h))](
        q, latent, norm_weight, rotations, positions, slots, cache, q.stride(0), q.stride(1), latent.stride(0), num_heads, eps,
        ROPE_AT=head_dim - rope, LATENT=latent_dim, ROPE=rope, BLOCK_H=config.block_h, num_warps=config.num_warps, launch_pdl=OVERLAPS)


def mla_norm_rope_store_reference(q: Tensor, latent: Tensor, norm_weight: Tensor, eps: float, rotations: Tensor, positions: Tensor,
                                  slots: Tensor, cache: Tensor) -> None:
    """As mla_norm_rope_store."""
    latent_dim, rotation = norm_weight.shape[0], rotations[positions]
    rotate_(q[..., q.shape[-1] - 2 * rotations.shape[1] :], rotation)
    row = latent.clone()
    row[:, :latent_dim] = rms_norm(latent[:, :latent_dim], norm_weight, eps)
    rotate_(row[:, latent_dim:].unsqueeze(1), rotation)
    is_real = slots >= 0
    cache[slots[is_real]] = row[is_real]


@triton.jit
def _mla_store_kernel(q, latent, norm_weight, rotations, positions, slots, cache, q_stride, head_stride, latent_stride, num_heads, eps,
                  ROPE_AT: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    rope = tl.arange(0, ROPE)[None, :]
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    is_head = heads < num_heads
    in_q = q + token * q_stride + heads * head_stride + (ROPE_AT + rope)
    columns = tl.arange(0, LATENT)
    gain = tl.load(norm_weight + columns)
    wait_for_earlier()
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    rotation = tl.load(rotations + position * ROPE + rope)
    unrotated = tl.load(in_q, mask=is_head, other=0.0).to(tl.float32)
    tl.store(in_q, rotate_pairs(unrotated, rotation, BLOCK_H, ROPE), mask=is_head)

    if (tl.program_id(1) == 0) & (slot >= 0):
        source, dest = latent + token * latent_stride, cache + slot * (LATENT + ROPE)
        row = tl.load(source + columns).to(tl.float32)
        key = tl.load(source + LATENT + rope).to(tl.float32)
        tl.store(dest + columns, normed(row, gain, eps, LATENT, latent.dtype.element_ty))
        tl.store(dest + LATENT + rope, rotate_pairs(key, rotation, 1, ROPE))
