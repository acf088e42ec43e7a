"""What the decode attention kernels share: one tile's step of the online softmax."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def accumulate(scores, values, num_tokens, acc, top, totals, scale, TOKENS_AXIS: tl.constexpr, IS_MASKED: tl.constexpr, DOT: tl.constexpr):
    """Add a tile's values, weighted by its scores, to what was gathered from the tiles before.

    scores      [tokens, heads] where TOKENS_AXIS is 0, [heads, tokens] where it is 1; `scale` is that of base-2 exponents
    values      [tokens, d], finite also past `num_tokens`
    num_tokens  those past it do not count, if IS_MASKED
    returns     acc [d, heads], top [heads] the best scaled scores, totals like scores: weights added up tile over tile
    """
    scores *= scale
    if IS_MASKED:
        is_token = tl.arange(0, scores.shape[TOKENS_AXIS]) < num_tokens
        scores = tl.where(tl.expand_dims(is_token, 1 - TOKENS_AXIS), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, TOKENS_AXIS))
    rescale = tl.exp2(top - new_top)
    weights = tl.exp2(scores - tl.expand_dims(new_top, TOKENS_AXIS))
    totals = totals * tl.expand_dims(rescale, TOKENS_AXIS) + weights
    if TOKENS_AXIS == 1:
        weights = tl.trans(weights)
    acc = tl.dot(tl.trans(values).to(DOT), weights.to(DOT), acc * rescale[None, :])
    return acc, new_top, totals


@triton.jit
def store_result(acc, top, total, heads, columns, mask, is_head, out_row, out_stride_h, results, log_sums, partial, is_whole,
                 NUM_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Finish a sequence's sums acc [d, heads] by their softmax sums [heads], for good or as partial result number `partial`.

    heads, columns  indices [heads], [d]
    mask, is_head   [d, heads], [heads]: what of them exists
    """
    acc = acc / total[None, :]
    if is_whole:
        tl.store(out_row + heads[None, :] * out_stride_h + columns[:, None], acc.to(out_row.dtype.element_ty), mask=mask)
    else:
        rows = partial * NUM_HEADS + heads
        tl.store(results + rows[None, :] * VALUE_DIM + columns[:, None], acc, mask=mask)
        tl.store(log_sums + rows, top + tl.log2(total), mask=is_head)
