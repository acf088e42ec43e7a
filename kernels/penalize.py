"""Change logits by what a sequence said so far and by what it may say, as `workers/penalties.py` does on a CPU.

How often a sequence said each token stands in a table on the device, because the newest token may be known there only: `count_tokens`
fills a row, `draw` adds to it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import loop_bound
from kernels.row_params import (
    ALLOWED_START,
    COUNT_ROW,
    DECAY_LOG,
    DECAY_START,
    FREQUENCY,
    INDEX,
    IS_ADJUSTED,
    MIN_TOKENS,
    MOST_ALLOWED,
    NUM_ALLOWED,
    PRESENCE,
    REPETITION,
    WORDS,
    number,
    real,
)

ALLOWED = tl.constexpr(MOST_ALLOWED)
COUNT_BLOCK = 1024
MAX_DECAY_EXPONENT = tl.constexpr(60.0)  # e**60 puts any logit above all others and is still a finite float32


@dataclass(frozen=True, slots=True)
class Config:
    block: int        # columns of one program
    num_warps: int


def config_for(vocab_size: int) -> Config:
    return Config(block=128, num_warps=1) if vocab_size <= 1024 else Config(block=4096, num_warps=4)


def penalize(logits: Tensor, num_rows: int, params: Tensor, counts: Tensor | None, eos_ids: Tensor, *,
             config: Config | None = None) -> None:
    """In place: repetition, frequency, presence over counted tokens; the length penalty on EOS; masks of EOS and of tokens not allowed.

    logits   [>= num_rows, V] float32; rows may be strided, columns not
    params   [>= num_rows * WORDS] int64, see `row_params`, lists of allowed ids after the rows. Rows that do not ask for it are
             not touched.
    counts   [rows, V] int16; None if no row has penalties
    eos_ids  [E] int64, E a power of two; -1 fills up

    Raises ValueError for logits of another type, with strided columns or fewer rows.
    """
    vocab_size = logits.shape[1]
    if logits.dtype != torch.float32 or logits.stride(1) != 1 or min(logits.shape[0], params.numel() // WORDS.value) < num_rows:
        raise ValueError(f"penalize: {num_rows} rows, logits {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}")
    config = config or config_for(vocab_size)
    if num_rows:
        # Rounded operation by operation, as on a CPU: a fused multiply-add would now and then turn a draw.
        _penalize_kernel[(triton.cdiv(vocab_size, config.block), num_rows)](
            logits, logits.stride(0), params, counts, eos_ids, VOCAB=vocab_size, NUM_EOS=eos_ids.numel(), BLOCK=config.block,
            num_warps=config.num_warps, enable_fp_fusion=False)


def count_tokens(counts: Tensor, row: int, words: Tensor, start: int, num_ids: int) -> None:
    """Make one row of the table say these counts and no others.

    counts   [rows, V] int16
    words    [>= start + 2 * num_ids] int64: from `start` on num_ids distinct token ids, then as many numbers below 2**15
    """
    vocab_size = counts.shape[1]
    _count_kernel[(triton.cdiv(vocab_size, COUNT_BLOCK),)](counts, row, words, start, num_ids, VOCAB=vocab_size, BLOCK=COUNT_BLOCK,
                                                           num_warps=4)


@triton.jit
def _penalize_kernel(logits, stride, words, counts, eos_ids, VOCAB: tl.constexpr, NUM_EOS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    if number(words, row, IS_ADJUSTED) != 0:
        first = tl.program_id(0) * BLOCK
        columns = first + tl.arange(0, BLOCK)
        line = logits + row * stride
        if counts is not None:
            count_row = number(words, row, COUNT_ROW)
            if count_row >= 0:
                seen = tl.load(counts + count_row * VOCAB + columns, mask=columns < VOCAB, other=0)
                values = tl.load(line + columns, mask=seen > 0, other=0.0)
                repetition = real(words, row, REPETITION).to(tl.float32)
                values = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
                values -= real(words, row, FREQUENCY).to(tl.float32) * seen.to(tl.float32)
                tl.store(line + columns, values - real(words, row, PRESENCE).to(tl.float32), mask=seen > 0)
        # Whatever follows reads or replaces what other threads of this program wrote above.
        tl.debug_barrier()
        _lengthen(line, words, row, eos_ids, first, NUM_EOS, BLOCK)
        num_allowed = number(words, row, NUM_ALLOWED)
        if num_allowed > 0:
            place = tl.arange(0, ALLOWED)
            allowed = tl.load(words + number(words, row, ALLOWED_START) + place, mask=place < num_allowed, other=-1)
            is_here = (allowed >= first) & (allowed < first + BLOCK)
            tl.debug_barrier()
            kept = tl.load(line + allowed, mask=is_here)
            tl.debug_barrier()
            tl.store(line + columns, float("-inf"), mask=columns < VOCAB)
            tl.debug_barrier()
            tl.store(line + allowed, kept, mask=is_here)


@triton.jit
def _lengthen(line, words, row, eos_ids, first, NUM_EOS: tl.constexpr, BLOCK: tl.constexpr):
    """EOS rises with the length, or is masked while it would come too early."""
    index = number(words, row, INDEX)
    num_beyond = index - number(words, row, DECAY_START)
    decay = real(words, row, DECAY_LOG)
    is_rising = (decay != 0.0) & (num_beyond > 0)
    is_early = index < number(words, row, MIN_TOKENS) - 1
    if is_rising | is_early:
        eos = tl.load(eos_ids + tl.arange(0, NUM_EOS))
        is_here = (eos >= first) & (eos < first + BLOCK)
        values = tl.load(line + eos, mask=is_here, other=0.0)
        rise = (tl.exp(tl.minimum(num_beyond.to(tl.float64) * decay, MAX_DECAY_EXPONENT)) - 1.0).to(tl.float32)
        values = tl.where(is_rising, values + tl.abs(values) * rise, values)
        tl.store(line + eos, tl.where(is_early, float("-inf"), values), mask=is_here)


@triton.jit(do_not_specialize=["row", "start", "num_ids"])
def _count_kernel(counts, row, words, start, num_ids, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Every program clears its columns and then looks through all ids for those that lie among them."""
    first = tl.program_id(0) * BLOCK
    lanes = tl.arange(0, BLOCK)
    line = counts + row.to(tl.int64) * VOCAB
    tl.store(line + first + lanes, tl.zeros([BLOCK], tl.int16), mask=first + lanes < VOCAB)
    tl.debug_barrier()
    for done in range(0, loop_bound(num_ids), BLOCK):
        place = done + lanes
        token = tl.load(words + start + place, mask=place < num_ids, other=-1)
        is_here = (token >= first) & (token < first + BLOCK)
        tl.store(line + token, tl.load(words + start + num_ids + place, mask=is_here, other=0).to(tl.int16), mask=is_here)
