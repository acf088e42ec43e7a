"""The ceilings of the GPU in front of us, measured: every figure is held against these, not against a data sheet."""

import subprocess

import torch

from bench.gpu_timing import time_call
from bench.roofline import Ceilings

COPY_BYTES = 4 << 30
MATRIX = 8192
NUM_TINY_KERNELS = 256
BURST_S = 0.02             # of matrix products: much longer, and the power limit lowers the clock


def measure_ceilings() -> Ceilings:
    """Takes about a second and 10 GB of device memory. What cannot be measured keeps its default."""
    default = Ceilings()
    found = Ceilings(bytes_per_s=_copy_rate(), bf16_flops=_matmul_rate(torch.bfloat16, MATRIX), fp8_flops=_fp8_rate(default.fp8_flops),
                     fp32_flops=_matmul_rate(torch.float32, MATRIX // 2), launch_s=_launch_s())
    torch.cuda.empty_cache()
    return found


def ceilings_line(ceilings: Ceilings) -> str:
    return (f"ceilings measured here: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, bf16 {ceilings.bf16_flops / 1e12:.0f} TFLOP/s, "
            f"fp8 {ceilings.fp8_flops / 1e12:.0f} TFLOP/s, fp32 {ceilings.fp32_flops / 1e12:.0f} TFLOP/s, "
            f"{ceilings.launch_s * 1e6:.2f} µs per tiny kernel in a graph")


def gpu_name() -> str:
    return torch.cuda.get_device_name()


def gpu_state() -> str:
    """Name, driver, clocks, temperature and power as nvidia-smi tells them."""
    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown, nvidia-smi: {type(error).__name__}"


def _copy_rate() -> float:
    """By a kernel: inside of a CUDA graph `copy_` becomes a memcpy node, which reaches two thirds of it."""
    source = torch.randint(-(1 << 31), 1 << 31, (COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (time_call(lambda index: torch.bitwise_not(source, out=target)).us * 1e-6)


def _matmul_rate(dtype: torch.dtype, size: int) -> float:
    left, right = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device="cuda")
    return 2 * size**3 / (time_call(lambda index: torch.mm(left, right, out=out), budget_s=BURST_S).us * 1e-6)


def _fp8_rate(default: float) -> float:
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    try:
        us = time_call(lambda index: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16,
                                                      use_fast_accum=True), budget_s=BURST_S).us
    except RuntimeError as error:
        print(f"fp8 ceiling not measured, {default / 1e12:.0f} TFLOP/s assumed: {str(error).splitlines()[0]}")
        return default
    return 2 * MATRIX**3 / (us * 1e-6)


def _launch_s() -> float:
    x = torch.zeros(128, device="cuda")

    def chain(index: int) -> None:
        for _ in range(NUM_TINY_KERNELS):
            x.add_(1.0)

    return time_call(chain).us * 1e-6 / NUM_TINY_KERNELS
