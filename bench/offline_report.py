"""Do all kernels compile for Hopper and fit: `python -m bench.offline_report [--only mla] [--json]`, on any machine.

Calls what each module of bench/cases lists as `offline_calls`, with the sizes of real use, and compiles the launches without a GPU.
Compiled kernels stay in Triton's cache, so that only changed ones cost time.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from bench.case_list import case_modules
from bench.compile_ahead import Launch, compile_launch, compile_pool, recording
from bench.survivor import first_line

MOST_SPILLED_BYTES = 128   # per thread, stack included: more costs memory traffic in an inner loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One kernel of one module of cases as it compiled. `failure` says why it may not be used."""

    module: str
    kernel: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    uses_wgmma: bool = False
    failure: str = ""

    def line(self) -> str:
        figures = f"{self.registers} registers, {self.spilled_bytes} spilled, {self.shared_bytes:,} shared, {self.num_warps} warps"
        return f"{self.module}: {self.kernel}: {self.failure or figures}{', wgmma' if self.uses_wgmma else ''}"


def compile_all(only: Sequence[str], num_jobs: int) -> Iterator[Report]:
    """Each distinct kernel of each module whose name contains a word of `only`; all without words."""
    launches: dict[tuple[str, Launch], None] = {}
    for module in case_modules():
        name = module.__name__.rpartition(".")[2]
        if only and not any(word in name for word in only):
            continue
        for number, call in enumerate(getattr(module, "offline_calls", list)()):
            try:
                with recording(is_filled=False) as seen:
                    call()
            except Exception as error:
                yield Report(module=name, kernel=f"offline call {number}", failure=first_line(error))
                continue
            launches.update(dict.fromkeys((name, launch.specialized()) for launch in seen))
    if not launches:
        return
    with compile_pool(num_jobs) as pool:
        compiled = [(name, launch, pool.submit(compile_launch, launch)) for name, launch in launches]
        for name, launch, future in compiled:
            found = future.result()
            if isinstance(found, str):
                yield Report(module=name, kernel=launch.kernel.name, failure=f"does not compile: {found}")
                continue
            failure = ""
            if not found.fits:
                failure = f"needs {found.shared_bytes:,} bytes of shared memory"
            elif found.spilled_bytes > MOST_SPILLED_BYTES:
                failure = f"spills {found.spilled_bytes} bytes per thread"
            yield Report(module=name, kernel=found.name, registers=found.registers, spilled_bytes=found.spilled_bytes, failure=failure,
                         shared_bytes=found.shared_bytes, num_warps=found.num_warps, uses_wgmma=found.uses_wgmma)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 if a kernel may not be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.offline_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="comma-separated parts of the names of modules of bench/cases")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one object per line instead of text")
    arguments = parser.parse_args(argv)
    num_failed = 0
    for report in compile_all([word for word in arguments.only.split(",") if word], arguments.jobs):
        print(json.dumps(asdict(report)) if arguments.json else report.line(), flush=True)
        num_failed += bool(report.failure)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
