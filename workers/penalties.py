"""Change logits by what a sequence said so far and by what it may say: LightLLM's penalties, EOS rules and allowed tokens.

Order: repetition, frequency, presence; then the length penalty on EOS; then masks (EOS too early, tokens not allowed); then biases; last
the mask of a guide. Tokens are counted over the output, and over the prompt too with `input_penalty`. Each sequence keeps its counts and
adds to them what came since the last step, so a step costs the number of distinct tokens, whatever the length.
"""

from array import array
from collections.abc import Sequence as Seq
from math import exp, inf, log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.sampling import SamplingParams
from workers.sequence import Sequence

MAX_DECAY_EXPONENT = 60.0  # e**60 puts any logit above all others and is still a finite float32


class TokenCounts:
    """How often each token occurred, as two parallel arrays that a step can hand over whole."""

    def __init__(self, first: int) -> None:
        self._next = first  # position in the sequence of the first token not counted yet
        self._slots: dict[int, int] = {}
        self._ids = array("q")
        self._counts = array("f")

    def update(self, token_ids: Seq[int]) -> None:
        """Count what was appended since the last call."""
        for position in range(self._next, len(token_ids)):
            token_id = token_ids[position]
            slot = self._slots.get(token_id)
            if slot is None:
                self._slots[token_id] = len(self._ids)
                self._ids.append(token_id)
                self._counts.append(1.0)
            else:
                self._counts[slot] += 1.0
        self._next = len(token_ids)

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(distinct token ids, their counts), copied: views would keep the arrays from growing."""
        return np.array(self._ids, dtype=np.int64), np.array(self._counts, dtype=np.float32)


def needs_adjusting(params: SamplingParams) -> bool:
    _, decay = params.exponential_decay_length_penalty
    return (params.has_penalties or bool(params.allowed_token_ids) or params.min_new_tokens > 1 or decay != 1.0
            or bool(params.logit_bias) or params.is_guided)


def adjust(logits: Tensor, sequences: list[Sequence], counts: dict[int, TokenCounts], eos_ids: Seq[int]) -> None:
    """In place, for all rows at once.

    logits     [num_seqs, vocab_size] fp32, contiguous
    counts     row -> its sequence's counts, up to date; only rows with penalties
    """
    _penalize(logits, sequences, counts)
    _lengthen(logits, sequences, eos_ids)
    for row, sequence in enumerate(sequences):
        if sequence.params.allowed_token_ids:
            allowed = torch.tensor(sequence.params.allowed_token_ids, device=logits.device)
            kept = logits[row, allowed]
            logits[row] = -inf
            logits[row, allowed] = kept
        if sequence.params.logit_bias:
            biased, biases = zip(*sequence.params.logit_bias, strict=True)
            logits[row].index_add_(0, torch.tensor(biased, device=logits.device), torch.tensor(biases, device=logits.device))
    guided = [(row, sequence.guide) for row, sequence in enumerate(sequences) if sequence.guide is not None]
    if guided:
        forbid(logits, torch.tensor([row for row, _ in guided], device=logits.device),
               torch.from_numpy(np.stack([guide.mask() for _, guide in guided])).to(logits.device))


def forbid(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Leave only what masks allow, in place and without waiting for a device.

    logits  [num_seqs, vocab_size], any float type
    rows    [n] int64, the rows of logits that the masks are for
    masks   [n, ceil(vocab_size / 32)] int32: bit i of word w is for token 32 * w + i; set: allowed
    """
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    is_allowed = ((masks.unsqueeze(-1) >> bits) & 1).bool().flatten(1)[:, :logits.shape[1]]
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(~is_allowed, -inf))


def _penalize(logits: Tensor, sequences: list[Sequence], counts: dict[int, TokenCounts]) -> None:
    if not counts:
        return
    vocab_size = logits.shape[1]
    ids, numbers, lengths = [], [], []
    for row, of_row in counts.items():
        row_ids, row_counts = of_row.arrays()
        ids.append(row_ids + row * vocab_size)
        numbers.append(row_counts)
        lengths.append(len(row_ids))
    every = [sequences[row].params for row in counts]
    per_row = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in every], dtype=np.float32)
    per_entry = torch.from_numpy(np.repeat(per_row, lengths, axis=0)).to(logits.device)
    repetition, frequency, presence = per_entry.unbind(1)
    index = torch.from_numpy(np.concatenate(ids)).to(logits.device)
    flat = logits.view(-1)
    seen = flat[index]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    flat[index] = seen - frequency * torch.from_numpy(np.concatenate(numbers)).to(logits.device) - presence


def _lengthen(logits: Tensor, sequences: list[Sequence], eos_ids: Seq[int]) -> None:
    """EOS rises with the length, or is masked. The EOS token itself counts in min_new_tokens, as in LightLLM."""
    risen: list[tuple[int, float]] = []
    masked: list[int] = []
    for row, sequence in enumerate(sequences):
        params = sequence.params
        start, factor = params.exponential_decay_length_penalty
        if factor != 1.0 and sequence.num_output > start:
            rise = exp(min((sequence.num_output - start) * log(factor), MAX_DECAY_EXPONENT)) - 1.0
            risen += [(row * logits.shape[1] + eos, rise) for eos in eos_ids]
        if sequence.num_output < params.min_new_tokens - 1 and not set(eos_ids).issuperset(params.allowed_token_ids or (-1,)):
            masked += [row * logits.shape[1] + eos for eos in eos_ids]
    flat = logits.view(-1)
    if risen:
        index = torch.tensor([where for where, _ in risen], device=logits.device)
        flat[index] += flat[index].abs() * torch.tensor([rise for _, rise in risen], device=logits.device)
    if masked:
        flat[torch.tensor(masked, device=logits.device)] = -inf
