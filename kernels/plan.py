"""Which cache slots each new token attends to: made once per forward pass, read by every layer's attention.

A slot holds one token's keys and values: slot = page id * page_size + offset in the page. Where a sequence's pages follow each
other, its slots are a plain range and attention reads the cache in place; otherwise they are listed.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Rotary:
    """Where the new tokens stand in their sequences, and what turns each position means."""

    def __init__(self, table: Tensor, positions: Tensor) -> None:
        self.table = table          # [max_position, rope dim / 2, 2] float32: cosine and sine
        self.positions = positions  # [T] int64

    @cached_property
    def by_token(self) -> Tensor:
        """[T, rope dim / 2, 2]"""
        return self.table[self.positions]


@dataclass(slots=True)
class Chunk:
    """New tokens of one sequence (a prefill chunk): rows [start, end) of the batch, the last tokens of the first `seq_len`."""

    start: int
    end: int
    seq_len: int
    slots: slice | Tensor            # of all seq_len tokens: a range, or [seq_len] int64

    # [end - start, seq_len] added to the scores: 0 where the key is not after the query, -inf elsewhere. None when the chunk
    # starts its sequence: then plain causal attention says the same.
    mask: Tensor | None


@dataclass(slots=True)
class DecodeGroup:
    """One new token in each of N sequences. All attend at once, so the shorter are padded; groups keep the padding small."""

    rows: Tensor | None              # [N] int64 rows of the batch; None: all rows of the batch, in order
    page_table: Tensor               # [N, max_pages] int32; entries past a sequence's end repeat its first page
    seq_lens: Tensor                 # [N] int32, the new token included
    page_size: int
    lens: list[int]                  # seq_lens on the host
    runs: list[slice | Tensor]       # each sequence's slots, as in Chunk
    memo: dict[object, object] = field(default_factory=dict)  # what a kernel derives from the above, once for all layers


@dataclass(slots=True)
class AttentionPlan:
    """The new tokens of a batch, split by how they attend."""

    chunks: list[Chunk]
    groups: list[DecodeGroup]


def make_plan(query_lens: list[int], seq_lens: list[int], page_tables: list[list[int]], page_size: int, device: torch.device,
              dtype: torch.dtype) -> AttentionPlan:
    """Lists with one entry per sequence, in the order of their tokens in the batch; `dtype` is that of the masks.

    A page table may be longer than its sequence needs, never shorter.
    """
    chunks: list[Chunk] = []
    decodes: list[_Decode] = []
    start = 0
    for query_len, seq_len, pages in zip(query_lens, seq_lens, page_tables, strict=True):
        assert 1 <= query_len <= seq_len <= len(pages) * page_size
        slots = _slots(pages, seq_len, page_size, device)
        if query_len == 1:
            decodes.append(_Decode(start, seq_len, pages[: -(-seq_len // page_size)], slots))
        else:
            mask = None if query_len == seq_len else _late_mask(query_len, seq_len, device, dtype)
            chunks.append(Chunk(start, start + query_len, seq_len, slots, mask))
        start += query_len
    return AttentionPlan(chunks, _groups(decodes, start, page_size, device))


class _Decode(NamedTuple):
    row: int
    seq_len: int
    pages: list[int]
    slots: slice | Tensor


def _slots(pages: list[int], seq_len: int, page_size: int, device: torch.device) -> slice | Tensor:
    num_pages = -(-seq_len // page_size)
    first = pages[0]
    if pages[:num_pages] == list(range(first, first + num_pages)):
        return slice(first * page_size, first * page_size + seq_len)
    table = torch.tensor(pages[:num_pages], dtype=torch.int64, device=device)
    return (table[:, None] * page_size + torch.arange(page_size, device=device)).flatten()[:seq_len]


def _late_mask(query_len: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    mask = torch.full((query_len, seq_len), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(seq_len - query_len + 1)


def _groups(decodes: list[_Decode], num_rows: int, page_size: int, device: torch.device) -> list[DecodeGroup]:
    """All in one group where the padding is small; otherwise groups of similar length."""
    if not decodes:
        return []
    lens = [decode.seq_len for decode in decodes]
    if _is_padding_small(max(lens), sum(lens), len(lens)):
        return [_group(decodes, num_rows, page_size, device)]
    decodes.sort(key=lambda decode: decode.seq_len)
    groups, begin, total = [], 0, 0
    for i, decode in enumerate(decodes):
        if i > begin and not _is_padding_small(decode.seq_len, total + decode.seq_len, i + 1 - begin):
            groups.append(_group(decodes[begin:i], num_rows, page_size, device))
            begin, total = i, 0
        total += decode.seq_len
    groups.append(_group(decodes[begin:], num_rows, page_size, device))
    return groups


def _is_padding_small(longest: int, total: int, count: int) -> bool:
    """A further group costs a few more calls per layer, worth about 64 padded tokens of each sequence."""
    return longest * count <= 1.25 * total + 64 * count


def _group(decodes: list[_Decode], num_rows: int, page_size: int, device: torch.device) -> DecodeGroup:
    rows = [decode.row for decode in decodes]
    width = max(len(decode.pages) for decode in decodes)
    table = [decode.pages + decode.pages[:1] * (width - len(decode.pages)) for decode in decodes]
    lens = [decode.seq_len for decode in decodes]
    return DecodeGroup(
        rows=None if rows == list(range(num_rows)) else torch.tensor(rows, dtype=torch.int64, device=device),
        page_table=torch.tensor(table, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        page_size=page_size,
        lens=lens,
        runs=[decode.slots for decode in decodes],
    )
