"""Draws next tokens on a GPU without ever waiting for it: the meaning of `workers/sampler.py`, row by row, in two to four launches.

The newest token of a sequence may still be on its way (`Sequence.num_in_flight`), so the host decides nothing by it: output indexes
come from counters, and how often a sequence said each token is kept in a table on the device, which the draw itself adds to.

    penalties, masks        penalize     if a row asks for it
    biases, guides' masks   (torch)      if a row asks for it
    largest, sums           survey       reads all logits
    token, log probability  draw         reads what the survey points at; counts the token
    likeliest tokens        (torch)      if a row asks for them

What the host says of a batch (parameters, lists, counts of sequences new to the table) goes over in one copy from pinned memory,
which torch does not hand out again before the copy has run.
"""

import zlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.messages import TopLogprobs
from coordinator.sampling import MAX_TOP_LOGPROBS, SamplingParams
from kernels.draw import draw
from kernels.penalize import count_tokens, penalize
from kernels.row_params import ALLOWED_START, COUNT_ROW, INDEX, NUM_ALLOWED, WORDS, RowParams
from kernels.survey import survey
from workers.penalties import forbid, needs_adjusting
from workers.sampler import top_logprobs
from workers.sequence import Sequence

MOST_COUNTED = 32767


@dataclass(slots=True, eq=False)
class _Known:
    """What the sampler keeps of a sequence, in `Sequence.sampling`."""

    packed: bytes
    is_plain: bool              # takes the largest logit as it is, and tells nothing else
    is_adjusted: bool
    has_counts: bool
    num_tops: int = 0
    bias: tuple[Tensor, Tensor] | None = None   # token ids, what is added to their logits
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
            self._bias_and_guide(logits, sequences, known)
        drawn = draw(logits, survey(logits, num_rows, params), params, self._counts)
        if any(each.num_tops for each in known):
            self._tell_tops(logits, sequences, known)
        return drawn

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
                       is_plain=params.is_greedy and not is_adjusted and not params.top_logprobs, has_counts=params.has_penalties,
                       num_tops=params.top_logprobs)
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            known.bias = self._copied(np.array(ids, dtype=np.int64)), self._copied(np.array(biases, dtype=np.float32))
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

    def _copied(self, values: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(values)
        return host if self._device.type == "cpu" else host.pin_memory().to(self._device, non_blocking=True)

    # ---- what few rows ask for ----

    def _bias_and_guide(self, logits: Tensor, sequences: list[Sequence], known: list[_Known]) -> None:
        for row, each in enumerate(known):
            if each.bias is not None:
                logits[row].index_add_(0, *each.bias)
        guided = [(row, sequence.guide) for row, sequence in enumerate(sequences) if sequence.guide is not None]
        if guided:
            rows = np.array([row for row, _ in guided], dtype=np.int64)
            forbid(logits, self._copied(rows), self._copied(np.stack([guide.mask() for _, guide in guided])))

    def _tell_tops(self, logits: Tensor, sequences: list[Sequence], known: list[_Known]) -> None:
        """Copies under way to the host; complete when the step is, and not looked at before (`Sequence.tops`)."""
        rows = [row for row, each in enumerate(known) if each.num_tops]
        wanted = logits.index_select(0, self._copied(np.array(rows, dtype=np.int64))).float()
        found, found_ids = wanted.topk(min(MAX_TOP_LOGPROBS, wanted.shape[1]))
        logprobs = _to_host(found - wanted.logsumexp(-1, keepdim=True))
        token_ids = _to_host(found_ids)
        for place, row in enumerate(rows):
            sequences[row].tops.append(partial(_told, known[row].num_tops, token_ids[place], logprobs[place]))


def _to_host(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return host.copy_(values, non_blocking=True)


def _told(count: int, token_ids: Tensor, logprobs: Tensor) -> TopLogprobs:
    return top_logprobs(count, token_ids.tolist(), logprobs.tolist())


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
