"""Is a kernel's output right: its distance from the reference, computed with memory that nobody wrote made visible."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

EMPTIES = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
POISONED = (torch.float32, torch.bfloat16, torch.float16)


class FillEmpty(TorchDispatchMode):
    """Inside of it `torch.empty` and its relatives give floats full of `value`, and zeros of every other type."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in EMPTIES:
            if out.dtype in POISONED:
                out.fill_(self._value)
            else:
                out.view(torch.int8 if out.dtype.itemsize == 1 else out.dtype).zero_()
        return out


def poisoned(call: Callable[[], Tensor]) -> Tensor:
    """The output of `call` when everything it allocates starts as NaN."""
    with FillEmpty(float("nan")):
        return call()


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; infinite if a number is not finite or the shapes differ."""
    if out.shape != reference.shape:
        return float("inf")
    wide = reference.float()
    error = float((out.float() - wide).norm() / wide.norm().clamp_min(1e-30))
    return error if error == error else float("inf")
