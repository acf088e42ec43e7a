"""What every layer of a model reads in one forward pass."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.plan import Rotary


@dataclass(frozen=True, slots=True)
class Step:
    """A batch as tensors, T new tokens of it."""

    token_ids: Tensor          # [T] int64
    rotary: Rotary             # of each token's position
    slots: Tensor              # [T] int64: where keys and values go
    logit_rows: Tensor | None  # [R] int64: rows whose logits are wanted; None: all rows
    plan: Any                  # who attends to what, in the form that the device's operations take
    num_valid: Tensor | None = None  # [1] int32: rows from there on only fill the batch up to the size of a CUDA graph
    capacity: int = 0                # rows that no dp group exceeds in this step, agreed by all; 0: not known, ranks tell their sizes
