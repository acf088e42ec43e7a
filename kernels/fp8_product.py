"""The inner loop of every product with block-scaled weights: what `fp8_linear` and `fp8_experts` have in common.

Hopper's matrix instruction wants 64 rows on its left side, so the weights stand there and the tokens on the right. K goes in steps of
128, one scale block, and each step's product is scaled into float32 sums: the tensor cores alone would keep about 14 bits of a sum of
e4m3 products (DeepSeek-V3 technical report, 3.3.2).
"""

import triton
import triton.language as tl

from kernels.block_fp8 import BLOCK
from kernels.launch import IS_INTERPRETED
from kernels.quant import quantize_group

_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def block_product(x, x_row, x_scales, scale_stride, w, w_row, w_scales, low, low_row, low_scales, first_column, num_steps,
                  STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, HALVES: tl.constexpr, QUANTIZES: tl.constexpr,
                  TMA: tl.constexpr, DOT: tl.constexpr):
    """Weights by tokens over num_steps = STEPS blocks of K: two sums [BLOCK_N, BLOCK_T] float32, the second only if HALVES is 2.

    x, w, low   where tokens, weights and the weights of the second sum stand: with TMA descriptors, whose tiles begin at x_row, w_row,
                low_row and first_column; without it pointers [rows, 128] at the first column
    x_scales    pointers [BLOCK_T] to the scales of the first block, the next block's scale_stride further; with QUANTIZES not used:
                then x is not fp8 yet and is quantized here
    w_scales    pointer to the scale of the first block, the next ones behind it; low_scales likewise
    """
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    low_acc = acc
    # Scales are read one step ahead, since only operands of a product are prefetched by the compiler. A large tile has no registers
    # to spare for that, and its product lasts longer than the reading.
    IS_LARGE: tl.constexpr = HALVES * BLOCK_T > 128
    w_scale = tl.load(w_scales)
    low_scale = tl.load(low_scales) if HALVES == 2 else w_scale
    if not QUANTIZES and not IS_LARGE:
        x_scale = tl.load(x_scales)
    for step in range(STEPS if _INTERPRETED else num_steps):   # known while compiling, the loop would be unrolled whole
        following = tl.minimum(step + 1, num_steps - 1)
        column = step * _BLOCK
        x_tile = x.load([x_row, first_column + column]) if TMA else tl.load(x + column)
        w_tile = w.load([w_row, first_column + column]) if TMA else tl.load(w + column)
        if QUANTIZES:
            x_tile, x_scale = quantize_group(x_tile.to(tl.float32), 1)
        elif IS_LARGE:
            x_scale = tl.load(x_scales + step * scale_stride)
        else:
            next_x_scale = tl.load(x_scales + following * scale_stride)
        next_w_scale = tl.load(w_scales + following)
        x_columns = tl.trans(x_tile.to(DOT))
        acc += tl.dot(w_tile.to(DOT), x_columns) * (x_scale * w_scale)[None, :]
        if HALVES == 2:
            w_tile = low.load([low_row, first_column + column]) if TMA else tl.load(low + column)
            next_low_scale = tl.load(low_scales + following)
            low_acc += tl.dot(w_tile.to(DOT), x_columns) * (x_scale * low_scale)[None, :]
            low_scale = next_low_scale
        w_scale = next_w_scale
        if not QUANTIZES and not IS_LARGE:
            x_scale = next_x_scale
    return acc, low_acc
