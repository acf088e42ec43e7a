"""What the prefill attention kernels share: which queries a program has, and one block's step of the online softmax.

The kernels are software-pipelined by hand. While the matrix unit multiplies the weights of one block of keys by its values, the
other units take the softmax of the next block:

    S[i + 1] = Q K[i + 1]^T  |  O += P[i] V[i]  |  P[i + 1], from S[i + 1]
                  waits      |       in flight until the next S has been waited for

So the weights are carried from one turn of the loop to the next, in half the registers when two of them share one (`hold`).
"""

import torch
import triton
import triton.language as tl

from kernels.launch import IS_INTERPRETED, loop_bound

LOG2_E = 1.4426950408889634
SEQS = tl.constexpr(256)  # looked at in one step of the search
_INTERPRETED = tl.constexpr(IS_INTERPRETED)


def num_tiles(num_queries: int, num_seqs: int, block_m: int) -> int:
    """An upper bound known to the host: `find_sequence` numbers the tiles of sequence b from cu_q[b] // block_m + b."""
    return num_queries // block_m + num_seqs


def packs_weights(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


@triton.jit
def find_sequence(cu_q, tile, num_seqs, BLOCK_M: tl.constexpr):
    """The sequence that has tile number `tile`, if any has: each leaves less than one tile unused."""
    seq = -1
    for first in range(0, loop_bound(num_seqs), SEQS):
        index = first + tl.arange(0, SEQS)
        starts = tl.load(cu_q + index, mask=index < num_seqs, other=0) // BLOCK_M + index
        seq += tl.sum(((starts <= tile) & (index < num_seqs)).to(tl.int32))
    return seq


@triton.jit
def softmax_step(scores, best, total, scale):
    """The weights of a block's scores [M, N], relative to the best score so far, as powers of two.

    returns  weights, best [M], total [M], correction [M] of what was added up before
    """
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_best[:, None])
    correction = tl.exp2(best - new_best)
    return weights, new_best, total * correction + tl.sum(weights, 1), correction


@triton.jit
def hold(weights, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """Weights [M, N] rounded to DTYPE; if that has 16 bits, as words [M, N / 2]. The compiler would give each a register of its own."""
    if not PACK:
        return weights.to(DTYPE)
    low, high = tl.split(tl.reshape(weights, [weights.shape[0], weights.shape[1] // 2, 2]))
    if _INTERPRETED:
        low, high = low.to(DTYPE).to(tl.uint16, bitcast=True), high.to(DTYPE).to(tl.uint16, bitcast=True)
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    if DTYPE.is_bf16():
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def release(held, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """What `hold` was given.

    The exclusive or with zero, which the assembler cannot know to be one, makes a copy: a product in flight may not read registers
    that the next weights are written to, and the assembler would run all products one after another.
    """
    if not PACK:
        return held
    zero = tl.program_id(2).to(tl.uint32)
    if _INTERPRETED:
        held = held ^ zero
    else:  # as one instruction, or the compiler would do it for each half
        held = tl.inline_asm_elementwise("xor.b32 $0, $1, $2;", "=r,r,r", [held, zero], dtype=tl.uint32, is_pure=True, pack=1)
    pairs = tl.join((held & 0xFFFF).to(tl.uint16), (held >> 16).to(tl.uint16))
    return tl.reshape(pairs, [held.shape[0], held.shape[1] * 2]).to(DTYPE, bitcast=True)
