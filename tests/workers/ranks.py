"""Several processes that compute together, each running one of the programs beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_ranks(program: Path, folder: Path, cases: list[dict[str, Any]], num_ranks: int, *, timeout_s: float = 280,
              **environment: str) -> list[Any]:
    """What each rank wrote to its result file. Raises AssertionError with the output of the ranks that failed."""
    (folder / "cases.json").write_text(json.dumps(cases))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.getcwd(), **environment}
    ranks = [subprocess.Popen([sys.executable, str(program), str(folder), str(rank), str(num_ranks)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env=variables) for rank in range(num_ranks)]
    try:
        outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    failed = [f"rank {i}: {output[-3000:]}" for i, (rank, output) in enumerate(zip(ranks, outputs, strict=True)) if rank.returncode]
    assert not failed, "\n".join(failed)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(num_ranks)]
