"""Uniform draws from a counter, not from a state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).

The draw for an output token depends on (seed, output index) alone, so a job that goes on elsewhere draws the same numbers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: U64, key: U64, rounds: int = 10) -> U64:
    """The block function, vectorised.

    counter  [..., 4] uint64, each below 2**32
    key      [..., 2] likewise
    returns  [..., 4] likewise
    """
    c0, c1, c2, c3 = (counter[..., i] for i in range(4))
    k0, k1 = key[..., 0], key[..., 1]
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(seeds: Sequence[int], indexes: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (64-bit seed, index)."""
    seed, index = np.array(seeds, dtype=np.uint64), np.array(indexes, dtype=np.uint64)
    zero = np.zeros_like(index)
    words = philox4x32(np.stack([index & _LOW, index >> _HALF, zero, zero], axis=-1), np.stack([seed & _LOW, seed >> _HALF], axis=-1))
    bits = ((words[..., 0] >> np.uint64(5)) << np.uint64(26)) | (words[..., 1] >> np.uint64(6))
    return bits * 2.0**-53
