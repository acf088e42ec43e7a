"""Draws next tokens on a GPU without ever waiting for it: the meaning of `workers/sampler.py`, row by row, in two to four launches.

The newest token of a sequence may still be on its way (`Sequence.num_in_flight`), so the host decides nothing by it: output indexes
come from counters, and how often a sequence said each token is kept in a table on the device, which the draw itself adds to.

    penalties, masks        penalize     if a row asks for it
    largest, sums           survey       reads all logits
    token, log probability  draw         reads what the survey points at; counts the token

What the host says of a batch (parameters, lists, counts of sequences new to the table) goes over in one copy from pinned memory,
which torch does not hand out again before the copy has run.
"""

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.sampling import SamplingParams
from kernels.draw import draw
from kernels.penalize import count_tokens, penalize
from kernels.row_params import ALLOWED_START, COUNT_ROW, INDEX, NUM_ALLOWED, WORDS, RowParams
from kernels.survey import survey
from workers.penalties import needs_adjusting
from workers.sequence import Sequence

MOST_COUNTED = 32767


@dataclass(slots=True, eq=False)
class _Known:
    """What the sampler keeps of a sequence, in `Sequence.sampling`."""

    packed: bytes
    is_plain: bool              # takes the largest logit as it is
    is_adjusted: bool
    has_counts: bool
    count_row: int = -1         # in the table, until another sequence needs it more
    num_counted: int = 0        # tokens, prompt included, that the row is about
    launch: int = 0             # the last one that used the row


@dataclass(frozen=True, slots=True)
class _Recount:
    """A row of the table to be filled, from words [start, start + 2 * num_ids) of the batch's table."""

    row: int
    start: int
    num_ids: int


class DeviceSampler:
    """Sequences that are preempted keep their row of counts if they can; rows are made again from the known tokens whenever they
    do not tell of all tokens."""

    def __init__(self, eos_ids: Seq[int], max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._eos_ids = frozenset(eos_ids)
        padded = 1 << max(0, len(eos_ids) - 1).bit_length()
        self._eos_table = torch.tensor([*eos_ids, *[-1] * (padded - len(eos_ids))], dtype=torch.int64, device=device)
        self._vocab_size = vocab_size
        self._device = device
        self._counts: Tensor | None = None   # [max_num_seqs, vocab_size] int16, from the first sequence with penalties on
        self._owners: list[_Known | None] = [None] * max_num_seqs
        self._num_launched = 0

    @torch.inference_mode()
    def launch(self, logits: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Draw the next token of each sequence.

        logits    [>= num_seqs, vocab_size] float32, or any float type; the first num_seqs rows may be changed in place
        returns   token ids [num_seqs] int64 and log probabilities [num_seqs] float32, on the device
        """
        num_rows = len(sequences)
        known: list[_Known] = [sequence.sampling or self._open(sequence) for sequence in sequences]
        if all(each.is_plain for each in known):
            return draw(logits, survey(logits, num_rows))
        self._num_launched += 1
        params, recounts = self._upload(sequences, known)
        for recount in recounts:
            count_tokens(self._table(), recount.row, params, recount.start, recount.num_ids)
        if any(each.is_adjusted for each in known):
            logits = logits[:num_rows].float()  # as it is if it is float32
            penalize(logits, num_rows, params, self._counts, self._eos_table)
        return draw(logits, survey(logits, num_rows, params), params, self._counts)

    def warm_up(self) -> None:
        """Compile every kernel in every form. Before any launch that counts; leaves nothing behind."""
        kinds = (SamplingParams(), SamplingParams(do_sample=True), SamplingParams(min_new_tokens=2, max_new_tokens=2),
                 SamplingParams(presence_penalty=1.0))
        for params in kinds:
            sequence = Sequence(job_id="warm-up", token_ids=[0, 0], num_prompt=1, params=params, max_kv_tokens=1)
            self.launch(torch.zeros(1, self._vocab_size, device=self._device), [sequence])
        self._counts, self._owners = None, [None] * len(self._owners)

    def _open(self, sequence: Sequence) -> _Known:
        params = sequence.params
        is_adjusted = needs_adjusting(params)
        known = _Known(packed=_pack(sequence, self._eos_ids, self._vocab_size), is_adjusted=is_adjusted,
                       is_plain=params.is_greedy and not is_adjusted, has_counts=params.has_penalties)
        sequence.sampling = known
        return known

    # ---- one batch ----

    def _upload(self, sequences: list[Sequence], known: list[_Known]) -> tuple[Tensor, list[_Recount]]:
        """The table of the batch on the device: rows of words, then lists that rows or recounts point at."""
        words = np.frombuffer(b"".join([each.packed for each in known]), dtype=np.int64).reshape(len(known), WORDS.value).copy()
        words[:, INDEX.value] = [sequence.num_output for sequence in sequences]
        lists: list[NDArray[np.int64]] = []
        recounts: list[_Recount] = []
        end = words.size
        adjusted = [(row, sequence, each) for row, (sequence, each) in enumerate(zip(sequences, known, strict=True)) if each.is_adjusted]
        for _, _, each in adjusted:
            each.launch = self._num_launched
        for row, sequence, each in adjusted:
            allowed = sequence.params.allowed_token_ids
            if allowed:
                words[row, ALLOWED_START.value], words[row, NUM_ALLOWED.value] = end, len(allowed)
                lists.append(np.array(allowed, dtype=np.int64))
                end += len(allowed)
            if each.has_counts:
                if self._is_stale(sequence, each):
                    ids, numbers = _counted(sequence)
                    recounts.append(_Recount(each.count_row, end, len(ids)))
                    lists += [ids, numbers]
                    end += 2 * len(ids)
                words[row, COUNT_ROW.value] = each.count_row
                each.num_counted = sequence.num_tokens + 1  # the draw adds its own token
        return self._copied(np.concatenate([words.ravel(), *lists])), recounts

    def _is_stale(self, sequence: Sequence, known: _Known) -> bool:
        """Whether its row of counts, which it is given if it has none, is to be made from its known tokens."""
        if known.count_row >= 0 and known.num_counted == sequence.num_tokens:
            return False
        assert not sequence.num_in_flight, "only a token drawn here can be in flight, and it was counted"
        if known.count_row < 0:
            self._give_row(known)
        return True

    def _give_row(self, known: _Known) -> None:
        """A row that nobody has, else that of the sequence longest away: at least one is not in this batch."""
        row = min(range(len(self._owners)), key=lambda row: owner.launch if (owner := self._owners[row]) else -1)
        owner = self._owners[row]
        if owner is not None:
            assert owner.launch < self._num_launched, "more sequences in a batch than max_num_seqs"
            owner.count_row = -1
        self._owners[row] = known
        known.count_row = row

    def _table(self) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros(len(self._owners), self._vocab_size, dtype=torch.int16, device=self._device)
        return self._counts

    def _copied(self, words: NDArray[np.int64]) -> Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(words)
        pinned = torch.empty(words.size, dtype=torch.int64, pin_memory=True)
        pinned.numpy()[:] = words
        return pinned.to(self._device, non_blocking=True)


def _pack(sequence: Sequence, eos_ids: frozenset[int], vocab_size: int) -> bytes:
    params = sequence.params
    decay_start, decay_factor = params.exponential_decay_length_penalty
    may_mask_eos = not eos_ids.issuperset(params.allowed_token_ids or (-1,))  # else nothing would be left
    return RowParams(
        is_sampled=not params.is_greedy, seed=_seed(sequence), temperature=params.temperature,
        top_k=params.top_k if 0 < params.top_k < vocab_size else 0, top_p=params.top_p, min_p=params.min_p,
        is_adjusted=needs_adjusting(params), repetition_penalty=params.repetition_penalty, frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty, decay_start=decay_start, decay_factor=decay_factor,
        min_tokens=params.min_new_tokens if may_mask_eos else 0).pack()


def _counted(sequence: Sequence) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct tokens that penalties are about, and how often each occurs."""
    start = 0 if sequence.params.input_penalty else sequence.num_prompt
    ids, numbers = np.unique(np.array(sequence.token_ids[start:], dtype=np.int64), return_counts=True)
    return ids, numbers.astype(np.int64).clip(max=MOST_COUNTED)


def _seed(sequence: Sequence) -> int:
    """Producers fill the seed in; without one it still has to be the same wherever the job goes on."""
    return zlib.crc32(sequence.job_id.encode()) if sequence.params.seed is None else sequence.params.seed
