"""Rotary embedding of a tile inside of a kernel: neighbours (x[2i], x[2i + 1]) are a pair, turned by one angle."""

import triton
import triton.language as tl


@triton.jit
def rotate_pairs(x, rotation, ROWS: tl.constexpr, DIM: tl.constexpr):
    """x [ROWS, DIM] and rotation [ROWS or 1, DIM] (cosine and sine of each pair side by side), float32 -> [ROWS, DIM] float32."""
    first, second = tl.split(tl.reshape(x, (ROWS, DIM // 2, 2)))
    cos, sin = tl.split(tl.reshape(rotation, (rotation.shape[0], DIM // 2, 2)))
    return tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), (ROWS, DIM))
