"""Finds the fastest configuration of each kernel at each size: `python -m bench.tune --only mla_decode --limit_s 200 --jobs 14`.

All candidates are compiled first, in processes that leave the GPU alone; then each is checked against plain torch and timed.
Writes OUT/tune_<gpu>.json after each case: {kernel: {shape: [[configuration, microseconds], …]}}, fastest first.
`python -m bench.tune --show FILE` prints the winners of such a file, on any machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.survivor import run_to_the_end

RESULTS = Path("bench/results")
WORKER = "bench.tune_worker"
SHOWN = 3

Tuned = dict[str, dict[str, list[list[Any]]]]  # kernel -> shape -> [[configuration, microseconds], …]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    made.add_argument("--only", default="", help="comma-separated parts of 'kernel / shape'; default: every case")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    made.add_argument("--limit_s", type=float, default=500.0, help="nothing new is begun after so many seconds (default: %(default)s)")
    made.add_argument("--jobs", type=int, default=14, help="compiling processes; 0: compile in place (default: %(default)s)")
    made.add_argument("--most_configs", type=int, default=1000, help="only the first so many candidates of each case")
    made.add_argument("--show", type=Path, help="print the winners of this file and do nothing else")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    if arguments.show:
        print(winners(json.loads(arguments.show.read_text(encoding="utf-8"))))
        return 0
    return run_to_the_end(WORKER, given, arguments.limit_s)


def winners(tuned: Tuned, shown: int = SHOWN) -> str:
    """The fastest few of each case, and how far the rest is behind."""
    lines = []
    for kernel, shapes in tuned.items():
        for shape, entries in shapes.items():
            lines.append(f"{kernel} / {shape}  ({len(entries)} candidates)")
            best = entries[0][1] if entries else 0.0
            lines += [f"    {us:9.2f} µs  {us / best:5.2f}x  {config_text(config)}" for config, us in entries[:shown]]
    return "\n".join(lines)


def config_text(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


if __name__ == "__main__":
    sys.exit(main())
