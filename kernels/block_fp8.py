"""Weights as DeepSeek-V3 stores them: e4m3 numbers with one float32 scale per block of 128 x 128. Knows no kernel and no file."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128              # rows and columns that share a scale; activations share one per 128 columns of a row
E4M3_MAX = 448.0
TINY = 1e-20             # the least amax that scales are made for: zeros stay zeros


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """data [..., N, K] float8_e4m3fn times scale [..., ceil(N / 128), ceil(K / 128)] float32, each spread over its block."""

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.data.shape[-2:]
        expected = (*self.data.shape[:-2], -(-rows // BLOCK), -(-columns // BLOCK))
        if self.data.dtype != torch.float8_e4m3fn or self.scale.dtype != torch.float32:
            raise ValueError(f"data must be float8_e4m3fn and scale float32, got {self.data.dtype} and {self.scale.dtype}")
        if self.scale.shape != expected:
            raise ValueError(f"scales {list(self.scale.shape)} do not cover {list(self.data.shape)}: {list(expected)} would")

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def with_rows(self, order: Tensor) -> "BlockFp8":
        """The rows [N] in another order, in which none leaves its block: then scales stay right. Raises ValueError otherwise."""
        if not torch.equal(order // BLOCK, torch.arange(self.data.shape[-2], device=order.device) // BLOCK):
            raise ValueError(f"rows of fp8 weights may only change places within blocks of {BLOCK}")
        numbers = self.data.view(torch.uint8).index_select(-2, order.to(self.data.device))
        return BlockFp8(numbers.view(torch.float8_e4m3fn), self.scale)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The numbers that are meant, [..., N, K]."""
        rows, columns = self.data.shape[-2:]
        by_element = self.scale.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
        return (self.data.float() * by_element).to(dtype)


def quantize(weight: Tensor) -> BlockFp8:
    """weight [..., N, K] of any float type -> the same, each block scaled so that its largest number becomes e4m3's largest."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))        # [..., N / 128, 128, K / 128, 128]
    amax = blocks.abs().amax((-3, -1)).clamp_min(TINY)
    data = (blocks * (E4M3_MAX / amax)[..., :, None, :, None]).to(torch.float8_e4m3fn)
    whole = data.view(torch.uint8).flatten(-4, -3).flatten(-2).view(torch.float8_e4m3fn)
    return BlockFp8(whole[..., :rows, :columns].contiguous(), amax / E4M3_MAX)
