"""One kernel at one size: what `bench.kernels` measures, `bench.tune` searches and the tests on a GPU check.

A module of `bench/cases/` has `cases() -> list[KernelCase]`; nothing is allocated before `setup` is called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A case with its tensors on the device. `num_sets` input sets are there so that rotating among them keeps the L2 cache cold.

    run        (config or None for the committed table's, index of the input set) -> the output. Allocates nothing that a CUDA
               graph cannot hold, never synchronizes.
    reference  (index of the input set) -> the same in plain torch, computed in float32 or better where memory allows
    configs    candidates for the tuner, likely ones first
    peers      other implementations of the same, by name: called with the index of the input set
    """

    run: Callable[[Any, int], Tensor]
    reference: Callable[[int], Tensor] | None
    num_sets: int = 1
    configs: Sequence[Any] = ()
    peers: dict[str, Callable[[int], object]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCase:
    kernel: str                                # its module in kernels/
    shape: str                                 # for people: "H 16, 128 x 4096 tokens"
    num_bytes: int                             # fewest bytes that device memory must move
    num_flops: int
    rate: Literal["bf16", "fp8", "fp32"]       # the arithmetic ceiling that applies
    setup: Callable[[], Prepared]
    bar: str = ""                              # what the figure has to reach, if a bar is set: ">= 2,700 GB/s"
    max_error: float = 1e-2                    # relative, ||out - ref|| / ||ref||
