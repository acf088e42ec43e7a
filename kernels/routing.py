"""Choose each token's experts from the router's logits, DeepSeek-V2's way or V3's, and for small steps sort them in the same launch.

Knows scores and ids; the experts' weights are not its business. Always in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.align import Aligned, align_into
from kernels.launch import OVERLAPS, wait_for_earlier

ONE_PROGRAM = 512      # tokens times experts (both padded) that one program chooses and sorts faster than two launches do
SEVERAL = 2048         # scores of a program that only chooses
PER_THREAD = 8         # scores in a thread's registers
FILL = 1024            # slots that are filled at a time


def route(logits: Tensor, bias: Tensor | None, *, top_k: int, num_groups: int = 1, groups_per_token: int = 1, scaling_factor: float = 1.0,
          normalize: bool = False, num_shared: int = 0, num_valid: Tensor | None = None,
          aligned: Aligned | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    logits            [T, E] float32, rows contiguous; or [S, T, E], parts that are added up in their order
    bias              None: softmax scores, a group counts by its best expert (DeepSeek-V2)
                      [E] float32: sigmoid scores; score + bias decides, a group counts by its best two, the score is the weight (V3)
    groups_per_token  experts come from so many of the num_groups groups, the token's best
    scaling_factor    multiplies the weights, after they are brought to a sum of 1 if `normalize` says so
    num_shared        experts that every token visits with weight 1: ids E, E + 1, …
    num_valid         None or [1] int32: tokens from there on are padding: ids -1, weights 0, whatever their logits
    aligned           room for the order of the ids by expert, of T * (top_k + num_shared) rows and E + num_shared experts, to be filled
                      as `align` does: in the same launch if the step is small
    returns           ids [T, top_k + num_shared] int32, best first, the lower of equals first, shared ones last; weights alike, float32

    Raises ValueError for other logits, and if the groups hold too few experts. Source: transformers' modeling_deepseek_v2 and _v3.
    """
    num_tokens, num_experts = logits.shape[-2:]
    per_group, rest = divmod(num_experts, num_groups)
    if logits.dtype != torch.float32 or logits.stride(-1) != 1:
        raise ValueError(f"logits must be float32 with contiguous rows, not {logits.dtype} with strides {logits.stride()}")
    if rest or groups_per_token * per_group < top_k:
        raise ValueError(f"cannot choose {top_k} experts from {groups_per_token} of {num_groups} groups of {num_experts} experts")
    num_chosen = top_k + num_shared
    ids = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    block_g, block_p = triton.next_power_of_2(num_groups), triton.next_power_of_2(per_group)
    all_tokens = triton.next_power_of_2(num_tokens)
    sorts = aligned is not None and 0 < all_tokens * block_g * block_p <= ONE_PROGRAM
    block_t = all_tokens if sorts else min(max(SEVERAL // (block_g * block_p), 1), all_tokens)
    if num_tokens:
        num_warps = min(max(block_t * block_g * block_p // (32 * PER_THREAD), 1), 16)
        _route[(triton.cdiv(num_tokens, block_t),)](
            logits, bias, num_valid, ids, weights, aligned and aligned.sorted_rows, aligned and aligned.block_experts,
            num_tokens, logits.stride(0), logits.stride(-2), aligned.num_blocks if aligned else 0, scaling_factor,
            NUM_PARTS=logits.shape[0] if logits.ndim == 3 else 1, NUM_EXPERTS=num_experts, TOP_K=top_k, NUM_GROUPS=num_groups,
            GROUPS_PER_TOKEN=groups_per_token, NORMALIZE=normalize, NUM_SHARED=num_shared, BLOCK_T=block_t, BLOCK_G=block_g,
            BLOCK_P=block_p, BLOCK_K=triton.next_power_of_2(num_chosen),
            BLOCK_M=aligned.block_m if aligned and sorts else 0, FILL=FILL, num_warps=num_warps, launch_pdl=OVERLAPS)
    if aligned is not None and not sorts:
        align_into(aligned, ids, num_experts + num_shared)
    return ids, weights


def route_reference(logits: Tensor, bias: Tensor | None, *, top_k: int, num_groups: int = 1, groups_per_token: int = 1,
                    scaling_factor: float = 1.0, normalize: bool = False, num_shared: int = 0) -> tuple[Tensor, Tensor]:
    """`route` without padding, in plain torch; the order of a token's experts may differ."""
    if bias is None:
        ids, weights = reference.route_softmax(logits, top_k, num_groups, groups_per_token, 1.0)
        if normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * scaling_factor
    else:
        ids, weights = reference.route_noaux(logits, bias, top_k, num_groups, groups_per_token, scaling_factor, normalize)
    num_tokens, num_experts = logits.shape
    shared = torch.arange(num_experts, num_experts + num_shared, device=ids.device).expand(num_tokens, -1)
    return torch.cat((ids, shared), 1).int(), torch.cat((weights, torch.ones_like(shared, dtype=torch.float32)), 1)


@triton.jit
def _best(scores):
    """Per row of scores [T, n] (no NaN among them): the largest, and the lowest index that has it."""
    return tl.max(scores, 1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _group_scores(scores, BIASED: tl.constexpr, T: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """scores [T, G * P] -> [T, G]: the best of each group, or the sum of its best two."""
    rows = tl.reshape(scores, [T * G, P])
    group, first = _best(rows)
    if BIASED and P > 1:
        group += tl.max(tl.where(tl.arange(0, P)[None, :] == first[:, None], float("-inf"), rows), 1)
    return tl.reshape(group, [T, G])


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "scaling_factor"])
def _route(logits, bias, num_valid, ids, weights, sorted_rows, block_experts, num_tokens, part_stride, row_stride, num_blocks,
           scaling_factor, NUM_PARTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr,
           GROUPS_PER_TOKEN: tl.constexpr, NORMALIZE: tl.constexpr, NUM_SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
           BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, FILL: tl.constexpr):
    # Columns are experts, every group at a multiple of BLOCK_P: a column's number grows with the expert's.
    PER_GROUP: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_P
    NUM_CHOSEN: tl.constexpr = TOP_K + NUM_SHARED
    LOWEST: tl.constexpr = -1.0e30   # what a NaN counts: less than any logit, more than an expert that cannot be chosen
    columns = tl.arange(0, BLOCK_E)
    groups = columns // BLOCK_P
    experts = groups * PER_GROUP + columns % BLOCK_P
    is_expert = (columns % BLOCK_P < PER_GROUP) & (groups < NUM_GROUPS)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if num_valid is None:
        num_kept = num_tokens
    else:
        num_kept = tl.minimum(tl.load(num_valid), num_tokens)
    is_kept = tokens < num_kept
    rows = logits + tokens[:, None].to(tl.int64) * row_stride + experts[None, :]
    is_logit = is_kept[:, None] & is_expert[None, :]
    wait_for_earlier()
    x = tl.load(rows, mask=is_logit, other=LOWEST)
    for part in tl.static_range(1, NUM_PARTS):
        x += tl.load(rows + part * part_stride, mask=is_logit, other=0.0)
    x = tl.maximum(tl.where(x == x, x, LOWEST), LOWEST)
    if bias is None:
        # The logit decides: it orders as the softmax does, and still where that underflows.
        top = tl.max(x, 1)
        scale = scaling_factor / tl.sum(tl.where(is_expert[None, :], tl.exp(x - top[:, None]), 0.0), 1)
        remaining = x
    else:
        small = tl.exp(-tl.abs(x))   # never overflows
        scores = tl.where(x < 0, small, 1.0) / (1.0 + small)
        scale = tl.full([BLOCK_T], scaling_factor, tl.float32)
        remaining = scores + tl.load(bias + experts, mask=is_expert, other=0.0)[None, :]
    remaining = tl.where(is_expert[None, :], remaining, float("-inf"))

    if NUM_GROUPS > GROUPS_PER_TOKEN:
        group_index = tl.arange(0, BLOCK_G)[None, :]
        group_scores = _group_scores(remaining, bias is not None, BLOCK_T, BLOCK_G, BLOCK_P)
        group_scores = tl.where(group_index < NUM_GROUPS, group_scores, float("-inf"))
        for _ in tl.static_range(GROUPS_PER_TOKEN):
            _, group = _best(group_scores)
            group_scores = tl.where(group_index == group[:, None], float("-inf"), group_scores)
        is_out = tl.broadcast_to((group_scores > float("-inf"))[:, :, None], [BLOCK_T, BLOCK_G, BLOCK_P])
        remaining = tl.where(tl.reshape(is_out, [BLOCK_T, BLOCK_E]), float("-inf"), remaining)

    choices = tl.arange(0, BLOCK_K)[None, :]
    chosen_ids = tl.where(choices < TOP_K, -1, NUM_EXPERTS - TOP_K + choices) + tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    chosen_weights = tl.where(choices < TOP_K, 0.0, 1.0) + tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    choice_of = tl.full([BLOCK_T, BLOCK_E], -1, tl.int32)   # which choice of the token an expert is
    total = tl.zeros([BLOCK_T], tl.float32)
    for choice in tl.static_range(TOP_K):
        best, column = _best(remaining)
        is_it = columns[None, :] == column[:, None]
        if bias is None:
            weight = tl.exp(best - top)
        else:
            weight = tl.sum(tl.where(is_it, scores, 0.0), 1)
        remaining = tl.where(is_it, float("-inf"), remaining)
        choice_of = tl.where(is_it, choice, choice_of)
        chosen_ids = tl.where(choices == choice, (column // BLOCK_P * PER_GROUP + column % BLOCK_P)[:, None], chosen_ids)
        chosen_weights = tl.where(choices == choice, weight[:, None], chosen_weights)
        total += weight
    if NORMALIZE:
        scale = scaling_factor / (total + 1e-20)
    chosen_weights = tl.where(choices < TOP_K, chosen_weights * scale[:, None], chosen_weights)
    outputs = tokens[:, None].to(tl.int64) * NUM_CHOSEN + choices
    is_output = (tokens < num_tokens)[:, None] & (choices < NUM_CHOSEN)
    tl.store(ids + outputs, tl.where(is_kept[:, None], chosen_ids, -1), mask=is_output)
    tl.store(weights + outputs, tl.where(is_kept[:, None], chosen_weights, 0.0), mask=is_output)
    if BLOCK_M > 0:
        _sort(choice_of, tokens, columns, experts, is_kept, num_kept, num_tokens * NUM_CHOSEN, sorted_rows, block_experts, num_blocks,
              NUM_EXPERTS, TOP_K, NUM_SHARED, BLOCK_M, FILL)


@triton.jit
def _sort(choice_of, tokens, columns, experts, is_kept, num_kept, num_rows, sorted_rows, block_experts, num_blocks,
          NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr, BLOCK_M: tl.constexpr, FILL: tl.constexpr):
    """What `align` does, by one program that still has the choice of every token in its registers: choice_of [T, E], -1 if not chosen.

    A token chooses an expert at most once, so that a row's place within its expert is the number of earlier tokens that chose it.
    """
    is_chosen = (choice_of >= 0) & is_kept[:, None]
    chosen = is_chosen.to(tl.int32)
    place = tl.cumsum(chosen, 0) - chosen
    num_chosen_by = tl.sum(chosen, 0)
    num_own_blocks = (num_chosen_by + BLOCK_M - 1) // BLOCK_M
    first_block = tl.cumsum(num_own_blocks, 0) - num_own_blocks
    rows = tokens[:, None] * (TOP_K + NUM_SHARED) + choice_of
    tl.store(sorted_rows + first_block[None, :] * BLOCK_M + place, rows, mask=is_chosen)
    tl.store(block_experts + first_block[None, :] + place // BLOCK_M, tl.broadcast_to(experts[None, :], choice_of.shape),
             mask=is_chosen & (place % BLOCK_M == 0))
    slots = tl.arange(0, BLOCK_M)
    free = num_own_blocks * BLOCK_M - num_chosen_by   # at the end of an expert's last block
    last = (first_block + num_own_blocks) * BLOCK_M - 1
    tl.store(sorted_rows + last[:, None] - slots[None, :], num_rows, mask=slots[None, :] < free[:, None])

    block = tl.sum(num_own_blocks)
    num_own_blocks = (num_kept + BLOCK_M - 1) // BLOCK_M
    for shared in tl.static_range(NUM_SHARED):
        tl.store(sorted_rows + block * BLOCK_M + tokens, tokens * (TOP_K + NUM_SHARED) + TOP_K + shared, mask=is_kept)
        tl.store(block_experts + block + tokens, NUM_EXPERTS + shared, mask=tokens < num_own_blocks)
        tl.store(sorted_rows + block * BLOCK_M + num_kept + slots, num_rows, mask=num_kept + slots < num_own_blocks * BLOCK_M)
        block += num_own_blocks

    first_padding = num_kept * (TOP_K + NUM_SHARED)
    num_used = block + (num_rows - first_padding + BLOCK_M - 1) // BLOCK_M
    tl.store(block_experts + num_blocks, num_used)
    fill = tl.arange(0, FILL)
    unused = block
    while unused < num_blocks:
        tl.store(block_experts + unused + fill, -1, mask=unused + fill < num_blocks)
        unused += FILL
    slot = block * BLOCK_M
    while slot < num_blocks * BLOCK_M:
        row = first_padding + slot - block * BLOCK_M + fill
        tl.store(sorted_rows + slot + fill, tl.minimum(row, num_rows), mask=slot + fill < num_blocks * BLOCK_M)
        slot += FILL
