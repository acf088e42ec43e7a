"""What top_k and top_p leave of a distribution, found without sorting: inlined into the kernel that draws.

A token's depth is how many times its probability has to double to reach the row's largest. A filter is a limit on the depth, so
ties stay together. A limit is found by search: how many tokens (or how much of their weight) lie within each of four depths, and
on with the fifth where the target is passed, until at most one token is left between both ends.

Few tokens are looked at. Of each group of 64 neighbours the largest logit is known; a limit found among those maxima alone lies
too deep, never too high, so only groups whose maximum is within it can hold tokens that matter, and they are listed:

    maxima  ->  floor  ->  groups listed  ->  limit of top_k  ->  mass of the k largest  ->  limit of top_p

A flat distribution lists all groups, and the same steps read the row as often as the search has steps (8 or so, never over 14).
"""

import triton
import triton.language as tl

from kernels.launch import loop_bound
from kernels.row_params import DEEPEST as _DEEPEST
from kernels.row_params import FIXED_ONE as _FIXED_ONE

GROUP = tl.constexpr(64)
DEEPEST = tl.constexpr(_DEEPEST)
FIXED_ONE = tl.constexpr(_FIXED_ONE)
UNROLL = tl.constexpr(4)                         # tiles on their way at once: one program has a multiprocessor to itself
NOTHING = tl.constexpr(_DEEPEST // _FIXED_ONE)  # the depth that counts as no probability at all


@triton.jit
def depth_of(logits, top, scale):
    """Halvings of probability below the largest, in float32; NaN and what is masked lie deepest."""
    depth = (top - logits) * scale
    return tl.where(depth < NOTHING, depth, NOTHING)


@triton.jit
def weight_of(depth):
    """Probability in units of the largest."""
    return tl.where(depth < NOTHING, tl.exp2(-depth), 0.0)


@triton.jit
def fixed(depth):
    """As an integer, which can be bisected."""
    return (depth * FIXED_ONE).to(tl.int32)


@triton.jit
def load_tile(logits, groups, num_groups, tile, top, scale, COLUMNS: tl.constexpr, TILE: tl.constexpr, IS_LISTED: tl.constexpr):
    """Columns [TILE // GROUP, GROUP], at least COLUMNS where there are none, and their depths: of all in order, or of listed groups."""
    place = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)[:, None]
    if IS_LISTED:
        place = tl.load(groups + place, mask=place < num_groups, other=COLUMNS)
    columns = place * GROUP + tl.arange(0, GROUP)[None, :]
    found = tl.load(logits + columns, mask=columns < COLUMNS, other=float("-inf")).to(tl.float32)
    return columns, depth_of(found, top, scale)


@triton.jit
def search(logits, groups, num_groups, num_tiles, top, scale, target, is_mass, high, COLUMNS: tl.constexpr, TILE: tl.constexpr,
           IS_LISTED: tl.constexpr):
    """The least depth, in fixed point, within which tokens number `target` or weigh `target`; `high` if there is none before it."""
    low = high * 0 - 1
    below = target * 0.0                  # within low
    within = below + float("inf")         # within high
    least = tl.where(is_mass, tl.exp2(-high.to(tl.float32) / FIXED_ONE), 1.0)  # that one token within high adds
    while (high - low > 1) & (within - below >= 1.5 * least):
        step = (high - low + 4) // 5
        end_1, end_2 = low + step, tl.minimum(low + 2 * step, high)
        end_3, end_4 = tl.minimum(low + 3 * step, high), tl.minimum(low + 4 * step, high)
        in_1 = tl.zeros([TILE // GROUP, GROUP], tl.float32)
        in_2, in_3, in_4 = in_1, in_1, in_1
        for tile in tl.range(0, loop_bound(num_tiles), loop_unroll_factor=UNROLL):
            _, depth = load_tile(logits, groups, num_groups, tile, top, scale, COLUMNS, TILE, IS_LISTED)
            share = tl.where(is_mass, weight_of(depth), 1.0)
            place = fixed(depth)
            in_1 += tl.where(place <= end_1, share, 0.0)
            in_2 += tl.where(place <= end_2, share, 0.0)
            in_3 += tl.where(place <= end_3, share, 0.0)
            in_4 += tl.where(place <= end_4, share, 0.0)
        sum_1, sum_2, sum_3, sum_4 = _sums(in_1, in_2, in_3, in_4)
        is_1, is_2, is_3, is_4 = sum_1 >= target, sum_2 >= target, sum_3 >= target, sum_4 >= target
        low = tl.where(is_1, low, tl.where(is_2, end_1, tl.where(is_3, end_2, tl.where(is_4, end_3, end_4))))
        below = tl.where(is_1, below, tl.where(is_2, sum_1, tl.where(is_3, sum_2, tl.where(is_4, sum_3, sum_4))))
        high = tl.where(is_1, end_1, tl.where(is_2, end_2, tl.where(is_3, end_3, tl.where(is_4, end_4, high))))
        within = tl.where(is_1, sum_1, tl.where(is_2, sum_2, tl.where(is_3, sum_3, tl.where(is_4, sum_4, within))))
        least = tl.where(is_mass, tl.exp2(-high.to(tl.float32) / FIXED_ONE), 1.0)
    return high


@triton.jit
def _sums(a, b, c, d):
    """Four sums in float64 for the barriers of one."""
    ab, cd = tl.split(tl.sum(_flat(tl.join(tl.join(a, b), tl.join(c, d))).to(tl.float64), 0))
    sum_a, sum_b = tl.split(ab)
    sum_c, sum_d = tl.split(cd)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def _flat(x):
    """[M, N, 2, 2] -> [M * N, 2, 2]"""
    return tl.reshape(x, [x.shape[0] * x.shape[1], 2, 2])


@triton.jit
def mass_of_largest(logits, groups, num_groups, num_tiles, top, scale, limit, count, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Weight of exactly the `count` largest tokens, of which the last lies at `limit`."""
    number = tl.zeros([TILE // GROUP, GROUP], tl.int32)
    mass = tl.zeros([TILE // GROUP, GROUP], tl.float32)
    for tile in tl.range(0, loop_bound(num_tiles), loop_unroll_factor=UNROLL):
        _, depth = load_tile(logits, groups, num_groups, tile, top, scale, COLUMNS, TILE, True)
        is_above = fixed(depth) < limit
        number += is_above.to(tl.int32)
        mass += tl.where(is_above, weight_of(depth), 0.0)
    at_limit = weight_of(limit.to(tl.float32) / FIXED_ONE)
    return tl.sum(mass.to(tl.float64)) + (count - tl.sum(number)).to(tl.float64) * at_limit


@triton.jit
def list_groups(maxima, floor, top, scale, groups, NUM_GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """Write the groups whose maximum is within `floor`, in vocabulary order; how many. Seen by the whole program."""
    group = tl.arange(0, PADDED)
    largest = tl.load(maxima + group, mask=group < NUM_GROUPS, other=float("-inf"))
    is_listed = ((fixed(depth_of(largest, top, scale)) <= floor) & (group < NUM_GROUPS)).to(tl.int32)
    tl.store(groups + tl.cumsum(is_listed, 0) - is_listed, group, mask=is_listed == 1)
    tl.debug_barrier()
    return tl.sum(is_listed, 0)


@triton.jit
def filtered_limit(logits, maxima, groups, top, scale, total, top_k, top_p, limit, VOCAB: tl.constexpr, TILE: tl.constexpr,
                   NUM_GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr):
    """The depth within which a row keeps its tokens, and the number of groups listed, which hold all of them.

    total  weight of the whole row
    limit  what min_p allows
    """
    floor = limit
    num_maxima_tiles = tl.full([], (NUM_GROUPS + TILE - 1) // TILE, tl.int32)
    is_ranked = (top_k > 0) | (top_p < 1.0)
    target = tl.where(top_k > 0, top_k.to(tl.float64), top_p * total)
    if is_ranked:
        # Tokens at that depth weigh less all together than what top_p leaves out: the limit cannot lie deeper.
        bound = tl.log2(VOCAB / tl.maximum((total * (1.0 - top_p)).to(tl.float32), 1e-30)) + 0.01
        high = fixed(tl.where((top_k <= 0) & (bound < NOTHING), bound, NOTHING))
        floor = search(maxima, groups, 0, num_maxima_tiles, top, scale, target, top_k <= 0, high, NUM_GROUPS, TILE, False)
    num_groups = list_groups(maxima, floor, top, scale, groups, NUM_GROUPS, PADDED_GROUPS)
    num_tiles = tl.cdiv(num_groups * GROUP, TILE)
    if is_ranked:
        floor = search(logits, groups, num_groups, num_tiles, top, scale, target, top_k <= 0, floor, VOCAB, TILE, True)
    if (top_k > 0) & (top_p < 1.0):
        mass = mass_of_largest(logits, groups, num_groups, num_tiles, top, scale, floor, top_k, VOCAB, TILE)
        floor = search(logits, groups, num_groups, num_tiles, top, scale, top_p * mass, top_k > 0, floor, VOCAB, TILE, True)
    return tl.minimum(floor, limit), num_groups
