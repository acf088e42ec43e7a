"""One pass over a batch's logits: what each block of a row's columns holds, from which the rest is found without reading it all again.

    columns  |  64 |  64 | …  : largest of each group, only where rows are sampled
    columns  |     block      | : largest, where it stands first, sums of probability before and after temperature

The block is chosen by the size of the vocabulary alone, so a row's figures do not depend on how many rows there are.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.row_params import IS_SAMPLED, SCALE, WORDS, number, real
from kernels.token_filters import GROUP, depth_of, weight_of

LOG2_E = tl.constexpr(1.4426950408889634)
NUM_FIGURES = tl.constexpr(4)
NOWHERE = tl.constexpr(1 << 30)


@dataclass(frozen=True, slots=True)
class Config:
    block: int        # columns, a power of two of at least 64
    survey_warps: int
    draw_warps: int


# (largest vocabulary, configuration). The second launch, a program per row, walks the same blocks.
CONFIGS = ((1024, Config(block=128, survey_warps=1, draw_warps=1)), (1 << 30, Config(block=2048, survey_warps=4, draw_warps=16)))


def config_for(vocab_size: int) -> Config:
    return next(config for largest, config in CONFIGS if vocab_size <= largest)


@dataclass(frozen=True, slots=True)
class Survey:
    """blocks  [N, 4, num_blocks] float32: largest logit; first column that has it; sum of exp(logit - largest), and of the same
            with the row's temperature
    maxima     [N, num_groups] float32, largest logit of each 64 columns; None if no row is sampled
    """

    blocks: Tensor
    maxima: Tensor | None
    config: Config


def survey(logits: Tensor, num_rows: int, params: Tensor | None = None, *, config: Config | None = None) -> Survey:
    """Look at all logits once.

    logits   [>= num_rows, V]; rows may be strided, columns not
    params   [>= num_rows * WORDS] int64, see `row_params`; None if all rows take the largest
    returns  figures of the first num_rows rows

    Raises ValueError if columns are strided or rows are missing.
    """
    vocab_size = logits.shape[1]
    if logits.stride(1) != 1 or logits.shape[0] < num_rows or (params is not None and params.numel() < num_rows * WORDS.value):
        raise ValueError(f"survey: {num_rows} rows, logits {tuple(logits.shape)} with strides {logits.stride()}")
    config = config or config_for(vocab_size)
    num_blocks = triton.cdiv(vocab_size, config.block)
    blocks = torch.empty(num_rows, NUM_FIGURES.value, num_blocks, dtype=torch.float32, device=logits.device)
    maxima = None
    if params is not None:
        maxima = torch.empty(num_rows, triton.cdiv(vocab_size, GROUP.value), dtype=torch.float32, device=logits.device)
    if num_rows:
        _survey_kernel[(num_blocks, num_rows)](logits, logits.stride(0), params, blocks, maxima, VOCAB=vocab_size, BLOCK=config.block,
                                               num_warps=config.survey_warps)
    return Survey(blocks, maxima, config)


@triton.jit
def _survey_kernel(logits, stride, words, blocks, maxima, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    num_blocks = tl.num_programs(0)
    group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(logits + row * stride + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
    by_group = tl.max(values, 1)
    largest = tl.max(by_group, 0)
    first = tl.min(tl.min(tl.where(values == largest, columns, VOCAB), 1), 0)
    below = values - tl.where(largest == float("-inf"), 0.0, largest)  # nothing but masks: their sum is 0, not NaN
    at = blocks + row * NUM_FIGURES * num_blocks + block
    tl.store(at, largest)
    tl.store(at + num_blocks, first.to(tl.float32))  # exact: no vocabulary has 2**24 tokens
    tl.store(at + 2 * num_blocks, tl.sum(tl.sum(tl.exp2(below * LOG2_E), 1), 0))
    if words is not None and number(words, row, IS_SAMPLED) != 0:
        NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
        scale = real(words, row, SCALE).to(tl.float32)
        tl.store(at + 3 * num_blocks, tl.sum(tl.sum(tl.exp2(below * scale), 1), 0))
        tl.store(maxima + row * NUM_GROUPS + group, by_group, mask=group < NUM_GROUPS)


@triton.jit
def row_figures(blocks, row, NUM_BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Of a whole row: largest logit, its first column, log(sum(exp(logit - largest)))."""
    block = tl.arange(0, PADDED)
    is_real = block < NUM_BLOCKS
    at = blocks + row * NUM_FIGURES * NUM_BLOCKS + block
    largest = tl.load(at, mask=is_real, other=float("-inf"))
    first = tl.load(at + NUM_BLOCKS, mask=is_real, other=0.0).to(tl.int32)
    sums = tl.load(at + 2 * NUM_BLOCKS, mask=is_real, other=0.0)
    top = tl.max(largest, 0)
    token = tl.min(tl.where(is_real & (largest == top), first, NOWHERE), 0)
    return top, token, tl.log(tl.sum(sums * tl.exp2((largest - top) * LOG2_E), 0))


@triton.jit
def tempered_sums(blocks, row, top, scale, NUM_BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Weight of each block at the row's temperature, in units of the row's largest: [PADDED] float64."""
    block = tl.arange(0, PADDED)
    is_real = block < NUM_BLOCKS
    at = blocks + row * NUM_FIGURES * NUM_BLOCKS + block
    largest = tl.load(at, mask=is_real, other=float("-inf"))
    sums = tl.load(at + 3 * NUM_BLOCKS, mask=is_real, other=0.0)
    return (sums * weight_of(depth_of(largest, top, scale))).to(tl.float64)
