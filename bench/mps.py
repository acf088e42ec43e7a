"""CUDA's multi-process service for the time of a measurement."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def multi_process_service() -> Iterator[bool]:
    """CUDA's MPS, for processes that are started in this block; False where it cannot be had."""
    control = shutil.which("nvidia-cuda-mps-control")
    is_up = control is not None and subprocess.run([control, "-d"], check=False).returncode == 0
    try:
        yield is_up
    finally:
        if is_up and control is not None:
            subprocess.run([control], input=b"quit\n", check=False)
