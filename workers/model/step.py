"""What every layer of a model reads in one forward pass."""

from dataclasses import dataclass

from torch import Tensor

from kernels.plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class Step:
    """A batch as tensors, T new tokens of it."""

    token_ids: Tensor         # [T] int64
    rotation: Tensor          # [T, rope dim / 2, 2] float32: cosine and sine at each token's position
    slots: Tensor             # [T] int64: where keys and values go
    logit_rows: Tensor | None  # [R] int64: rows whose logits are wanted; None: all rows
    plan: AttentionPlan
