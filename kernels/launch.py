"""What every Triton kernel here needs to know about where it runs.

Under TRITON_INTERPRET=1 kernels run on the CPU, program after program, in numpy: how they are tested without a GPU. The
interpreter is right in float32 and float16 and wrong in bfloat16, so every product inside a kernel casts its operands to a
constexpr type that `dot_dtype` chooses. The variable is read when a kernel is decorated: set it before importing one.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(IS_INTERPRETED)
OVERLAPS = not IS_INTERPRETED   # launch_pdl of kernels that call `wait_for_earlier`
INTERPRETED_PROGRAMS = 6   # stands for the number of multiprocessors, so that persistent grids are exercised and still small
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type that the operands of a `tl.dot` over tensors of `dtype` are cast to."""
    return tl.float32 if IS_INTERPRETED else TL_DTYPES[dtype]


def num_programs(device: torch.device, per_multiprocessor: int = 1) -> int:
    """Programs of a persistent grid that fill the device."""
    return INTERPRETED_PROGRAMS if IS_INTERPRETED else _num_multiprocessors(device) * per_multiprocessor


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def wait_for_earlier():
    """From here on all that earlier kernels wrote is there. Every kernel launched with launch_pdl=OVERLAPS calls it, every program of it.

    Such a kernel starts while the one before it still runs, as soon as all programs of that one got past this call. So what stands
    ahead of the call writes nothing, and reads nothing but weights and what the kernel before the last left.
    """
    if not _INTERPRETED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def loop_bound(count):
    """`count`, for a range. The interpreter's scalars are arrays of one number, which numpy >= 2.4 does not take for integers."""
    if _INTERPRETED:
        return count.handle.data.item()
    return count
