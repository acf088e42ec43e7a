"""Compile Triton kernels for Hopper on a machine without a GPU: does it compile, do its registers and shared memory fit.

Inside of `compiling()` a launch compiles the kernel for sm_90 with the types and constants of the call and launches nothing, so
the ordinary wrappers can be called with (uninitialised) CPU tensors of real sizes. Outputs stay uninitialised.
TRITON_INTERPRET must not be set. Works for plain `@triton.jit` kernels.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MAX_SHARED_BYTES = 232_448  # per block on Hopper
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel as the assembler reports it. `uses_wgmma`: the products run on Hopper's own matrix instructions."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    uses_wgmma: bool

    @property
    def fits(self) -> bool:
        return self.shared_bytes <= MAX_SHARED_BYTES


class _Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cpu"


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Yields a list that grows with every kernel compiled (again for each launch, cached compilations included)."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels are never compiled"
    seen: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seen.append(_describe(kernel))
        return kernel

    active = driver._active
    driver.set_active(_Hopper())
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield seen
    finally:
        driver._active = active


def _describe(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return Compiled(kernel.metadata.name, int(counts["REG"]), int(counts["STACK"]), kernel.metadata.shared, kernel.metadata.num_warps,
                    "wgmma" in kernel.asm["ptx"])
