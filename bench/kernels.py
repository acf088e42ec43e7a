"""Every kernel against the roofline of the GPU in front of us: `python -m bench.kernels [--only mla_decode,moe] [--out bench/results]`.

Each figure comes with its relative error against plain torch and the times of other implementations of the same. Results are written
after each case to OUT/kernels_<gpu>.json, .md and .png; results of cases that this run does not touch stay in them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.survivor import run_to_the_end

RESULTS = Path("bench/results")
WORKER = "bench.kernels_worker"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.kernels", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--only", default="", help="comma-separated parts of 'kernel / shape'; default: every case")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    made.add_argument("--limit_s", type=float, default=560.0, help="no new case is begun after so many seconds (default: %(default)s)")
    made.add_argument("--skip_peers", action="store_true", help="leave other implementations out")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The work is done in a child process (`bench.kernels_worker`), so that a kernel that kills its process costs only its own case."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    return run_to_the_end(WORKER, given, arguments.limit_s)


if __name__ == "__main__":
    sys.exit(main())
