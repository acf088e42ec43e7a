"""Search rows of a whole vocabulary without sorting them: a maximum or a sum per block of tokens is one fast pass, and what is left
happens on small arrays. On a CPU that is several times faster than torch.argmax, and hundreds of times faster than torch.sort.

Blocks are `BLOCK` neighbouring columns; the last one may be short. A row's result never depends on other rows.
"""

from math import inf

import torch
from torch import Tensor

BLOCK = 64


def maxima(values: Tensor) -> Tensor:
    """The largest value of each block.

    values   [n, num_columns], contiguous
    returns  [n, num_blocks]
    """
    whole = values.shape[1] // BLOCK * BLOCK
    parts = [values[:, :whole].view(len(values), -1, BLOCK).amax(-1)] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def sums(values: Tensor) -> Tensor:
    """The sum of each block: [n, num_columns] -> [n, num_blocks]."""
    whole = values.shape[1] // BLOCK * BLOCK
    parts = [values[:, :whole].view(len(values), -1, BLOCK).sum(-1)] if whole else []
    if whole < values.shape[1]:
        parts.append(values[:, whole:].sum(-1, keepdim=True))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def gather(values: Tensor, block: Tensor, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """One block of each row.

    values   [n, num_columns]
    block    [n, 1] int64, which one
    returns  values [n, BLOCK], `padding` beyond the last column, and their columns [n, BLOCK] int64
    """
    columns = block * BLOCK + torch.arange(BLOCK, device=values.device)
    if values.shape[1] % BLOCK == 0:
        return values.gather(1, columns), columns
    is_real = columns < values.shape[1]
    columns = columns.clamp(max=values.shape[1] - 1)
    return values.gather(1, columns).where(is_real, padding), columns


def argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """(largest value, its first column), each [n, 1]."""
    largest, block = maxima(values).max(-1, keepdim=True)
    inside, columns = gather(values, block, -inf)
    return largest, columns.gather(1, inside.argmax(-1, keepdim=True))


def inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """The column where the running sum of a row first exceeds its draw's share of the row's sum; never one of weight 0.

    weights  [n, num_columns], not negative
    draws    [n, 1] float64 in [0, 1)
    returns  [n, 1] int64
    """
    block_cdf = sums(weights).double().cumsum(-1)
    target = draws * block_cdf[:, -1:]
    block = first_above(block_cdf, target)
    before = block_cdf.gather(1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    inside, columns = gather(weights, block)
    return columns.gather(1, first_above(inside.double().cumsum(-1), target - before))


def first_above(cdf: Tensor, target: Tensor) -> Tensor:
    """[n, 1]: the first position whose cdf exceeds the target; where rounding left none, the first that reaches the full sum."""
    return torch.minimum((cdf <= target).sum(-1, keepdim=True), (cdf < cdf[:, -1:]).sum(-1, keepdim=True))
