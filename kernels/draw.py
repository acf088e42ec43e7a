"""The next token of each row and its log probability: the largest, or one drawn; and the count of it, where tokens are counted.

One program per row goes from a `Survey` of the batch to the token. It reads again only the blocks or groups that matter, so
nothing of a row's result depends on its batch mates, and nothing is sorted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import loop_bound
from kernels.row_params import COUNT_ROW, INDEX, IS_SAMPLED, LIMIT, SCALE, SEED, TOP_K, TOP_P, number, real
from kernels.survey import Survey, row_figures, tempered_sums
from kernels.token_filters import DEEPEST, GROUP, UNROLL, filtered_limit, fixed, load_tile, weight_of

MOST_COUNTED = tl.constexpr(32767)


def draw(logits: Tensor, surveyed: Survey, params: Tensor | None = None, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token per surveyed row.

    logits    [>= N, V], as they were surveyed
    params    [>= N * WORDS] int64, see `row_params`, the survey's; None: every row takes its largest logit, the first if there are several
    counts    [rows, V] int16 or None: +1 for the token drawn, in the row that params name
    returns   token ids [N] int64, of a row without numbers any valid one; log probabilities [N] float32 before temperature and filters,
              not finite where the row has no numbers or nothing but masks

    Sampled rows: temperature, top_k, top_p over what top_k left, min_p, then the inverse of the cumulative distribution in vocabulary
    order at a uniform number that depends on (seed, index) alone. Source: Philox4x32-10, "Parallel random numbers", SC11.
    """
    num_rows, _, num_blocks = surveyed.blocks.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    config, vocab_size = surveyed.config, logits.shape[1]
    groups = sums = None
    if surveyed.maxima is not None:
        groups = torch.empty(surveyed.maxima.shape, dtype=torch.int32, device=logits.device)
        sums = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=logits.device)
    if num_rows:
        _draw_kernel[(num_rows,)](
            logits, logits.stride(0), surveyed.blocks, surveyed.maxima, params, counts, groups, sums, ids, logprobs, VOCAB=vocab_size,
            BLOCK=config.block, PADDED_BLOCKS=triton.next_power_of_2(num_blocks),
            PADDED_GROUPS=triton.next_power_of_2(triton.cdiv(vocab_size, GROUP.value)), num_warps=config.draw_warps)
    return ids, logprobs


@triton.jit
def _draw_kernel(logits, stride, blocks, maxima, words, counts, groups, sums, ids, logprobs, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
                 PADDED_BLOCKS: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    NUM_BLOCKS: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    top, token, log_sum = row_figures(blocks, row, NUM_BLOCKS, PADDED_BLOCKS)
    if words is not None and number(words, row, IS_SAMPLED) != 0:
        token = _drawn(line, blocks, maxima, words, groups, sums, row, top, VOCAB, BLOCK, NUM_BLOCKS, PADDED_BLOCKS, PADDED_GROUPS)
    token = tl.maximum(tl.minimum(token, VOCAB - 1), 0)
    tl.store(ids + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(line + token).to(tl.float32) - top - log_sum)
    if words is not None and counts is not None:
        count_row = number(words, row, COUNT_ROW)
        if count_row >= 0:
            at = counts + count_row * VOCAB + token
            tl.store(at, tl.minimum(tl.load(at).to(tl.int32) + 1, MOST_COUNTED).to(tl.int16))


@triton.jit
def _drawn(line, blocks, maxima, words, groups, sums, row, top, VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
           PADDED_BLOCKS: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    """The token of a sampled row; VOCAB or more if its logits are no numbers."""
    NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
    scale = real(words, row, SCALE).to(tl.float32)
    share = uniform(number(words, row, SEED), number(words, row, INDEX))
    top_k, top_p = number(words, row, TOP_K).to(tl.int32), real(words, row, TOP_P)
    limit = number(words, row, LIMIT).to(tl.int32)
    weights = tempered_sums(blocks, row, top, scale, NUM_BLOCKS, PADDED_BLOCKS)
    if (top_k <= 0) & (top_p >= 1.0) & (limit >= DEEPEST):
        tile, left = _passed(weights, share * tl.sum(weights, 0))
        columns, depth = load_tile(line, groups, 0, tile, top, scale, VOCAB, BLOCK, False)
        token = _column(columns, weight_of(depth), left)
    else:
        groups += row * NUM_GROUPS
        sums += row * NUM_BLOCKS
        limit, num_groups = filtered_limit(line, maxima + row * NUM_GROUPS, groups, top, scale, tl.sum(weights, 0), top_k, top_p, limit,
                                           VOCAB, BLOCK, NUM_GROUPS, PADDED_GROUPS)
        num_tiles = tl.cdiv(num_groups * GROUP, BLOCK)
        for tile in tl.range(0, loop_bound(num_tiles), loop_unroll_factor=UNROLL):
            columns, depth = load_tile(line, groups, num_groups, tile, top, scale, VOCAB, BLOCK, True)
            kept = tl.where(fixed(depth) <= limit, weight_of(depth), 0.0)
            tl.store(sums + tile, tl.sum(kept.to(tl.float64)))
        tl.debug_barrier()
        tiles = tl.arange(0, PADDED_BLOCKS)
        weights = tl.load(sums + tiles, mask=tiles < num_tiles, other=0.0)
        tile, left = _passed(weights, share * tl.sum(weights, 0))
        columns, depth = load_tile(line, groups, num_groups, tile, top, scale, VOCAB, BLOCK, True)
        token = _column(columns, tl.where(fixed(depth) <= limit, weight_of(depth), 0.0), left)
    return token


@triton.jit
def _passed(weights, target):
    """Where the running sum first exceeds `target`, and what of the target is left there; never at weight 0."""
    SIZE: tl.constexpr = weights.shape[0]
    place = tl.arange(0, SIZE)
    is_weighty = weights > 0.0
    passed = tl.min(tl.where(is_weighty & (tl.cumsum(weights, 0) > target), place, SIZE), 0)
    last = tl.max(tl.where(is_weighty, place, 0), 0)  # if rounding left none
    found = tl.where(passed < SIZE, passed, last)
    return found, target - tl.sum(tl.where(place < found, weights, 0.0), 0)


@triton.jit
def _column(columns, weights, target):
    """The column of a tile at which the running sum of its weights passes the target."""
    SIZE: tl.constexpr = columns.shape[0] * columns.shape[1]
    found, _ = _passed(tl.reshape(weights, [SIZE]).to(tl.float64), target)
    return tl.sum(tl.where(tl.arange(0, SIZE) == found, tl.reshape(columns, [SIZE]), 0), 0)


@triton.jit
def uniform(seed, index):
    """A double in [0, 1) with 53 random bits. seed, index: int64 bit patterns."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (index & 0).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((first >> 5).to(tl.int64) << 26) | (second >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53
