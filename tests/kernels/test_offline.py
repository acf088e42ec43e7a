"""Every kernel compiles for Hopper at the sizes of real use, and fits into its registers and shared memory. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

# Registers and buffers are the compiler's choice: another version compiles these kernels too, and spills more.
TUNED_WITH = "3.6."
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not triton.__version__.startswith(TUNED_WITH), reason=f"kernels are tuned with Triton {TUNED_WITH}x")
def test_kernels_compile_for_hopper_and_fit() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # interpreted: never compiled
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bench.offline_report", "--json"], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=280)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    left_out = [line for line in done.stdout.splitlines() if "left out" in line]
    failures = [f"{report['module']}: {report['kernel']}: {report['failure']}" for report in reports if report["failure"]]
    assert not failures and not left_out, "\n".join([*failures, done.stdout if left_out else ""])
    assert done.returncode == 0, done.stderr[-2000:]
    if not reports:
        pytest.skip("no module of bench/cases has kernels yet")
