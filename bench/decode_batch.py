"""What the decode attention cases share: sequences over shuffled pages, and enough sets of them that the L2 cache stays cold."""

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 64
COLD_BYTES = 200 << 20   # between two uses of one set: three times the L2 cache
MAX_SETS = 64


@dataclass(frozen=True, slots=True)
class Batches:
    """Sets of the same lengths over different pages of one cache."""

    num_slots: int
    page_tables: list[Tensor]   # each [N, max_pages] int32
    seq_lens: Tensor            # [N] int32

    def slots(self, index: int, length: int) -> Tensor:
        """Slots [N, length] of a set whose sequences all have that length."""
        pages = self.page_tables[index].long()
        return (pages.unsqueeze(-1) * PAGE_SIZE + torch.arange(PAGE_SIZE, device=pages.device)).flatten(1)[:, :length]


def make_batches(lens: list[int], bytes_per_set: int, device: torch.device) -> Batches:
    num_sets = min(MAX_SETS, max(1, -(-COLD_BYTES // bytes_per_set)))
    max_pages = -(-max(lens) // PAGE_SIZE)
    pages = torch.randperm(num_sets * len(lens) * max_pages, device=device).int()
    page_tables = list(pages.view(num_sets, len(lens), max_pages).unbind(0))
    return Batches(pages.numel() * PAGE_SIZE, page_tables, torch.tensor(lens, dtype=torch.int32, device=device))


def ragged(num_seqs: int, longest: int) -> list[int]:
    """Lengths evenly spread over [1, longest], in no order."""
    order = torch.randperm(num_seqs, generator=torch.Generator().manual_seed(0))
    return ((order + 1) * longest // num_seqs).tolist()
