"""The executor for GPUs and the operations behind it, in Triton's interpreter, against the plain model on the same checkpoint.

Kernels are decorated when they are imported, so this runs in a process of its own that sets TRITON_INTERPRET first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("cuda_executor_program.py")


@pytest.mark.parametrize("like", ["deepseek-v2-lite", "deepseek-v3", "llama"])
def test_it_computes_what_the_plain_model_computes(like: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), like], env=environment, cwd=PROGRAM.parents[2], capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
