"""What the host says about a step, at fixed addresses on the device: a captured CUDA graph reads it from there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import gqa_decode, mla_decode
from kernels.device_plan import Chunks, DevicePlan
from kernels.plan import Rotary
from kernels.split_schedule import SplitSchedule
from kernels.step_inputs import decode_inputs, prefill_inputs
from workers.batch import ForwardBatch
from workers.model.step import Step
from workers.model_config import ModelConfig

MAX_DECOMPRESSED_KEYS = 128 * 1024   # of one attention call over chunks: bounds the memory for their keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSizes:
    max_num_seqs: int
    max_tokens: int              # chunks and decodes of one step
    width: int                   # pages of one sequence
    page_size: int


class DeviceInputs:
    """The inputs of one step, or of a half of it; `samples` are the tokens that the step before drew, `config` counts a rank's heads."""

    def __init__(self, sizes: InputSizes, config: ModelConfig, rotations: Tensor, samples: Tensor) -> None:
        device = samples.device
        self._page_size, self._rotations, self._samples = sizes.page_size, rotations, samples
        self._decodes = DecodeInputs(sizes.max_num_seqs, sizes.width, device)
        self._chunks = ChunkInputs(sizes.max_tokens, sizes.max_num_seqs, sizes.width, device)
        self._schedule = SplitSchedule.allocate(sizes.max_num_seqs, _num_splits(config, device), device)

    @property
    def num_valid(self) -> int:
        """Decodes in the last step. Waits for the device."""
        return int(self._decodes.num_valid)

    def fill(self, batch: ForwardBatch, size: int) -> int:
        """Tell the device of the leading decodes, padded up to `size` rows. Returns their number."""
        num_decodes = leading_decodes(batch.query_lens)
        self._decodes.fill(batch, num_decodes, max(size, num_decodes))
        return num_decodes

    def clear(self, size: int) -> None:
        self._decodes.clear(size)

    def decodes(self, size: int, *, is_padded: bool, capacity: int = 0, logit_rows: Tensor | None = None) -> Step:
        """Decodes over the first `size` rows of what was filled in."""
        token_ids, positions, slots = self._chunks.rows(size)
        plan = self._plan_decodes(size, token_ids, positions, slots)
        return Step(token_ids, Rotary(self._rotations, positions), slots, logit_rows, plan,
                    self._decodes.num_valid if is_padded else None, capacity)

    def eager(self, batch: ForwardBatch, capacity: int = 0) -> Step:
        """A step of any kind; an empty one has a single row of padding."""
        num_rows = len(batch.token_ids)
        num_decodes = self.fill(batch, 0 if num_rows else 1)
        if num_decodes == len(batch.query_lens):
            is_every_row = len(batch.logit_rows) == num_rows
            wanted = None if is_every_row else torch.tensor(batch.logit_rows, dtype=torch.int64, device=self._samples.device)
            return self.decodes(max(num_decodes, 1), is_padded=not num_rows, capacity=capacity, logit_rows=wanted)
        token_ids, positions, slots = self._chunks.rows(num_rows)
        plan = self._plan_decodes(num_decodes, token_ids, positions, slots)
        wanted = self._chunks.fill(batch, num_decodes, token_ids, positions, slots, plan, self._page_size)
        return Step(token_ids, Rotary(self._rotations, positions), slots, wanted, plan, None, capacity)

    def _plan_decodes(self, size: int, token_ids: Tensor, positions: Tensor, slots: Tensor) -> DevicePlan:
        inputs = self._decodes
        seq_lens, page_table = inputs.seq_lens[:size], inputs.page_table[:size]
        if size:
            decode_inputs(inputs.tokens[:size], inputs.carried[:size], seq_lens, page_table, self._samples, self._page_size,
                          token_ids[:size], positions[:size], slots[:size])
            self._schedule.refill(seq_lens, size)
        return DevicePlan(self._page_size, size, page_table, seq_lens, self._schedule)


class DecodeInputs:
    """What the host says about decodes, at fixed addresses: a captured graph reads it from there.

    Pinned copies alternate, so that one can be written while the device still reads the other.
    """

    def __init__(self, max_seqs: int, width: int, device: torch.device) -> None:
        self._ints = torch.zeros(3 * max_seqs + 1, dtype=torch.int32, device=device)
        self.tokens, self.carried, self.seq_lens = self._ints[:-1].view(3, max_seqs)
        self.num_valid = self._ints[-1:]
        self.page_table = torch.zeros(max_seqs, width, dtype=torch.int32, device=device)
        self._pinned = [(host_zeros(device, torch.int32, 3 * max_seqs + 1), host_zeros(device, torch.int32, max_seqs, width))
                        for _ in range(2)]
        self._table: NDArray[np.int32] = np.zeros((max_seqs, width), dtype=np.int32)
        self._rows: list[tuple[Any, int]] = [(None, 0)] * max_seqs  # the page list that each row shows, and how many of it
        self._turn = 0

    def fill(self, batch: ForwardBatch, num_seqs: int, size: int) -> None:
        if not size:
            return
        self._turn ^= 1
        ints, table = self._pinned[self._turn]
        max_seqs = self.page_table.shape[0]
        values = ints.numpy()
        rows = values[:-1].reshape(3, max_seqs)
        rows[0, :num_seqs] = batch.token_ids[:num_seqs]
        rows[1, :num_seqs] = batch.carried[:num_seqs]
        rows[2, :num_seqs] = batch.seq_lens[:num_seqs]
        rows[2, num_seqs:size] = 0
        values[-1] = num_seqs
        self._ints.copy_(ints, non_blocking=True)
        if self._update(batch.page_tables, num_seqs):
            table.numpy()[:num_seqs] = self._table[:num_seqs]
            self.page_table[:num_seqs].copy_(table[:num_seqs], non_blocking=True)

    def clear(self, size: int) -> None:
        """All rows padding."""
        self.seq_lens[:size] = 0
        self.num_valid.zero_()

    def _update(self, page_tables: list[list[int]], num_seqs: int) -> bool:
        """A row is written only when it shows another sequence or more pages than before: rare in a run of decodes."""
        shown, is_changed = self._rows, False
        for row in range(num_seqs):
            pages = page_tables[row]
            known, count = shown[row]
            if known is pages and count == len(pages):
                continue
            first = count if known is pages and count < len(pages) else 0
            self._table[row, first : len(pages)] = pages[first:]
            shown[row] = pages, len(pages)
            is_changed = True
        return is_changed


class ChunkInputs:
    """Token rows of a step, and what the host says about chunks of prompts."""

    def __init__(self, max_tokens: int, max_seqs: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros(3, max_tokens, dtype=torch.int64, device=device)
        capacity = max_tokens + max_seqs * (width + 8) + 64
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [host_zeros(device, torch.int32, capacity) for _ in range(2)]
        self._width = width
        self._turn = 0

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """token_ids, positions, slots [count]"""
        return self._rows[0, :count], self._rows[1, :count], self._rows[2, :count]

    def fill(self, batch: ForwardBatch, num_decodes: int, token_ids: Tensor, positions: Tensor, slots: Tensor, plan: DevicePlan,
             page_size: int) -> Tensor:
        """Write rows from num_decodes on, add the chunks to the plan, return logit_rows."""
        self._turn ^= 1
        pinned = self._pinned[self._turn].numpy()
        used = 0

        def put(values: Any, count: int) -> slice:
            nonlocal used
            place = slice(used, used + count)
            pinned[place] = values
            used += -(-count // 16) * 16  # kernels like their pointers aligned
            return place

        num_chunk_tokens = len(batch.token_ids) - num_decodes
        places: list[tuple[list[int], range, tuple[slice, ...]]] = []
        tokens = put(batch.token_ids[num_decodes:], num_chunk_tokens)
        wanted = put(batch.logit_rows, len(batch.logit_rows))
        for group in _groups(batch.seq_lens, num_decodes):
            q = [0, *np.cumsum([batch.query_lens[i] for i in group]).tolist()]
            k = [0, *np.cumsum([batch.seq_lens[i] for i in group]).tolist()]
            table = np.zeros((len(group), self._width), dtype=np.int32)
            for row, i in enumerate(group):
                pages = batch.page_tables[i][: self._width]
                table[row, : len(pages)] = pages
            lens = [batch.seq_lens[i] for i in group]
            places.append((q, group, (put(q, len(q)), put(k, len(k)), put(lens, len(lens)), put(table.ravel(), table.size))))
        self._device[:used].copy_(self._pinned[self._turn][:used], non_blocking=True)
        token_ids[num_decodes:].copy_(self._device[tokens])
        start = num_decodes
        for q, group, (at_q, at_k, at_lens, at_table) in places:
            lens = [batch.seq_lens[i] for i in group]
            chunks = Chunks(start=start, end=start + q[-1], cu_q=self._device[at_q], cu_k=self._device[at_k],
                            seq_lens=self._device[at_lens], page_table=self._device[at_table].view(len(group), self._width),
                            max_q=max(batch.query_lens[i] for i in group), max_k=max(lens), num_keys=sum(lens))
            prefill_inputs(chunks.cu_q, chunks.seq_lens, chunks.page_table, chunks.max_q, page_size, positions[start : chunks.end],
                           slots[start : chunks.end])
            plan.chunks.append(chunks)
            start = chunks.end
        return self._device[wanted].long()


def host_zeros(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Host memory that copies to and from the device need not be waited for."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _groups(seq_lens: list[int], first: int) -> list[range]:
    """Sequences from `first` on, so many at a time that their decompressed keys stay within bounds."""
    groups, begin, total = [], first, 0
    for i in range(first, len(seq_lens)):
        if i > begin and total + seq_lens[i] > MAX_DECOMPRESSED_KEYS:
            groups.append(range(begin, i))
            begin, total = i, 0
        total += seq_lens[i]
    groups.append(range(begin, len(seq_lens)))
    return groups


def leading_decodes(query_lens: list[int]) -> int:
    for i, query_len in enumerate(query_lens):
        if query_len != 1:
            return i
    return len(query_lens)


def _num_splits(config: ModelConfig, device: torch.device) -> int:
    if config.mla is not None:
        return mla_decode.num_splits(config.num_heads, device)
    return gqa_decode.num_splits(config.num_kv_heads, config.head_dim, device)
