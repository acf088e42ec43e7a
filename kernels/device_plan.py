"""Who attends to what in a step, as the fused kernels take it: lengths and page tables on the device, bounds on the host.

Rows [0, num_decodes) are one new token each of that many sequences, the rest are chunks of prompts.
"""

from dataclasses import dataclass, field

from torch import Tensor

from kernels.split_schedule import SplitSchedule


@dataclass(frozen=True, slots=True)
class Chunks:
    """New tokens of B sequences: rows [start, end) of the batch."""

    start: int
    end: int
    cu_q: Tensor         # [B + 1] int32, counted from `start`
    cu_k: Tensor         # [B + 1] int32: the same over all tokens of the sequences
    seq_lens: Tensor     # [B] int32, new tokens included
    page_table: Tensor   # [B, max_pages] int32
    max_q: int
    max_k: int
    num_keys: int        # cu_k[B]


@dataclass(frozen=True, slots=True)
class DevicePlan:
    page_size: int
    num_decodes: int
    page_table: Tensor      # [num_decodes, max_pages] int32
    seq_lens: Tensor        # [num_decodes] int32; 0: a row of padding
    schedule: SplitSchedule
    chunks: list[Chunks] = field(default_factory=list)
