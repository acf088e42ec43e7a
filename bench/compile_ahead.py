"""Compiles a tuner's candidates in many processes that never touch the GPU, into Triton's disk cache where a launch finds them.

    with recording() as launches:          wrappers run, kernels are noted instead of launched
        prepared.run(config, 0)
    pool.submit(compile_launch, launch)    in a process without CUDA: same types, same constants, so the same cache entry

What a specialization depends on is all that travels: a tensor is its type and whether its address is a multiple of 16.
"""

import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.case_check import FillEmpty
from bench.offline_compile import Compiled, compiling

ALIGNMENT = 16
OPTIONS = frozenset({"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid", "launch_pdl"})
HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class TensorLike:
    dtype: torch.dtype
    is_aligned: bool


@dataclass(frozen=True, slots=True)
class DescriptorLike:
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    padding: str


@dataclass(frozen=True, slots=True)
class FunctionLike:
    module: str
    name: str


@dataclass(frozen=True, slots=True)
class TypeLike:
    name: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of one kernel."""

    kernel: FunctionLike
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...] | None = None  # None: computed by the launch

    def specialized(self) -> "Launch":
        """The same with every number that the compiled code does not depend on replaced: fewer launches to compile."""
        parameters = _function(self.kernel).params
        fixed = {parameter.name for parameter in parameters if parameter.is_constexpr} | OPTIONS
        arguments = tuple(value if parameter.name in fixed else _representative(value)
                          for parameter, value in zip(parameters, self.arguments, strict=False))
        options = tuple((name, value if name in fixed else _representative(value)) for name, value in self.options)
        return Launch(self.kernel, arguments, options)


@contextmanager
def recording(*, is_filled: bool = True) -> Iterator[list[Launch]]:
    """Yields a list of the launches made inside, which do not run. So that torch operations behind them find no wild indices, all that
    is allocated is zeros if `is_filled`.
    """
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launches.append(Launch(FunctionLike(self.fn.__module__, self.fn.__qualname__), tuple(_packed(arg) for arg in args),
                               tuple((name, _packed(value)) for name, value in sorted(options.items())),
                               None if callable(grid) else tuple(grid)))
        return SimpleNamespace()

    with mock.patch.object(JITFunction, "run", note), FillEmpty(0.0) if is_filled else nullcontext():
        yield launches


def compile_launch(launch: Launch) -> Compiled | str:
    """In a process of `compile_pool`: the kernel as compiled, or what went wrong."""
    try:
        kernel = _function(launch.kernel)
        options = {name: _unpacked(value) for name, value in launch.options}
        with compiling() as seen:
            kernel[(1,)](*(_unpacked(argument) for argument in launch.arguments), **options)
        return seen[-1]
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1]}"[:240]


def can_compile_ahead() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER


@contextmanager
def compile_pool(num_jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that see no GPU: they share this process's TRITON_CACHE_DIR, and die with it or with the block."""
    pool = ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_compiler,
                               initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


def _start_compiler(parent: int) -> None:
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _representative(value: Any) -> Any:
    """Run-time integers are compiled in only as: 1, a multiple of 16, anything else; and by their width."""
    if isinstance(value, float):
        return 0.5
    if not isinstance(value, int) or isinstance(value, bool) or value == 1:
        return value
    wide = 1 << 40 if abs(value) >= 1 << 31 else 0
    return wide + (ALIGNMENT if value % ALIGNMENT == 0 else 3)


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return TensorLike(value.dtype, value.data_ptr() % ALIGNMENT == 0)
    if isinstance(value, TensorDescriptor):
        return DescriptorLike(value.base.dtype, tuple(value.shape), tuple(value.strides), tuple(value.block_shape),
                              getattr(value, "padding", "zero"))
    if isinstance(value, JITFunction):
        return FunctionLike(value.fn.__module__, value.fn.__qualname__)
    if isinstance(value, tl.constexpr):
        return _packed(value.value)
    if isinstance(value, tl.dtype):
        return TypeLike(value.name)
    if isinstance(value, tuple | list):
        return tuple(_packed(each) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a launch with an argument of type {type(value).__name__} cannot be compiled elsewhere")


def _unpacked(value: Any) -> Any:
    match value:
        case TensorLike():
            memory = torch.zeros(2 * ALIGNMENT, dtype=value.dtype)
            return memory if value.is_aligned else memory[1:]
        case DescriptorLike():
            base = torch.zeros(ALIGNMENT, dtype=value.dtype)
            return TensorDescriptor(base, list(value.shape), list(value.strides), list(value.block_shape), value.padding)
        case FunctionLike():
            return _function(value)
        case TypeLike():
            return tl.dtype(value.name)
        case tuple():
            return tuple(_unpacked(each) for each in value)
    return value


def _function(like: FunctionLike) -> JITFunction[Any]:
    found = getattr(importlib.import_module(like.module), like.name)
    while not isinstance(found, JITFunction):
        found = found.fn  # behind a decorator such as triton.heuristics
    return found
