"""The process that measures kernels for `bench.kernels`; it may die in any case and is then started again."""

import gc
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.case_check import poisoned, relative_error
from bench.case_list import find_cases, key_of
from bench.ceilings import ceilings_line, gpu_name, gpu_state, measure_ceilings
from bench.gpu_timing import time_call
from bench.kernel_case import KernelCase, Prepared
from bench.kernel_result import KernelResult, slug, write_results
from bench.kernels import parser
from bench.machine import describe_machine
from bench.roofline import Ceilings
from bench.survivor import Ledger, end_if_broken, first_line

CEILINGS = "(ceilings)"
L2_TIMES = 3  # an input of so many times the L2 cache leaves nothing in it for the next call
PEER_BUDGET_S = 0.06


def main() -> int:
    made = parser()
    made.add_argument("--ledger", type=Path, required=True)
    made.add_argument("--deadline", type=float, required=True)
    arguments = made.parse_args()
    started = time.time()
    ledger = Ledger(arguments.ledger, arguments.deadline)
    ceilings = _ceilings(ledger)
    machine = {"gpu": gpu_name(), "state": gpu_state(), "ceilings": ceilings_line(ceilings), **describe_machine()}
    print(machine["state"], machine["ceilings"], sep="\n")
    cases = find_cases([word for word in arguments.only.split(",") if word])
    name = "kernels_" + slug(gpu_name())
    for number, case in enumerate(cases):
        if not ledger.begin(key_of(case)):
            continue
        result = _measured(case, ceilings, with_peers=not arguments.skip_peers)
        ledger.finish(key_of(case), result.to_json())
        print(f"[{number + 1}/{len(cases)}, {time.time() - started:.0f} s] {result.line()}")
        write_results(arguments.out, name, machine, _results(cases, ceilings, ledger), is_drawn=False)
    results = _results(cases, ceilings, ledger)
    for path in write_results(arguments.out, name, machine, results):
        print(f"wrote {path}")
    _summarize(results, len(cases) - len(results))
    return 0


def _ceilings(ledger: Ledger) -> Ceilings:
    if ledger.begin(CEILINGS):
        ledger.finish(CEILINGS, asdict(measure_ceilings()))
    known = ledger.entries.get(CEILINGS, {})
    return Ceilings() if "error" in known else Ceilings(**known)


def _results(cases: list[KernelCase], ceilings: Ceilings, ledger: Ledger) -> list[KernelResult]:
    results = []
    for case in cases:
        entry = ledger.entries.get(key_of(case))
        if entry is not None:
            results.append(_blank(case, ceilings, failure=entry["error"]) if "error" in entry else KernelResult.from_json(entry))
    return results


def _blank(case: KernelCase, ceilings: Ceilings, **known: Any) -> KernelResult:
    floor_us = ceilings.floor_s(case.num_bytes, case.num_flops, case.rate) * 1e6
    return KernelResult(kernel=case.kernel, shape=case.shape, num_bytes=case.num_bytes, num_flops=case.num_flops, floor_us=floor_us,
                        bar=case.bar, max_error=case.max_error, **known)


def _measured(case: KernelCase, ceilings: Ceilings, *, with_peers: bool) -> KernelResult:
    try:
        with torch.inference_mode():
            prepared = case.setup()
            error = None
            if prepared.reference is not None:
                error = relative_error(poisoned(lambda: prepared.run(None, 0)), prepared.reference(0))
                torch.cuda.empty_cache()
            timing = time_call(lambda index: prepared.run(None, index), prepared.num_sets, flush=_needs_flush(case, prepared))
            peers = _peers(case, prepared) if with_peers else {}
        return _blank(case, ceilings, us=timing.us, is_graph=timing.is_graph, relative_error=error, peers=peers)
    except Exception as error:
        end_if_broken(error)
        return _blank(case, ceilings, failure=first_line(error))
    finally:
        prepared = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()


def _needs_flush(case: KernelCase, prepared: Prepared) -> bool:
    if prepared.num_sets > 1:
        return False
    return case.num_bytes < L2_TIMES * torch.cuda.get_device_properties(0).L2_cache_size


def _peers(case: KernelCase, prepared: Prepared) -> dict[str, float | str]:
    times: dict[str, float | str] = {}
    for name, peer in prepared.peers.items():
        try:
            times[name] = time_call(peer, prepared.num_sets, budget_s=PEER_BUDGET_S, flush=_needs_flush(case, prepared)).us
        except Exception as error:
            end_if_broken(error)
            times[name] = first_line(error)
    return times


def _summarize(results: list[KernelResult], num_left: int) -> None:
    print("\nkernel / shape".ljust(74) + "µs".rjust(10) + "floor".rjust(10) + "share".rjust(8) + "  bar")
    for result in results:
        name, share = f"{result.kernel} / {result.shape}"[:72], f"{result.share:.0%}" if result.share else "–"
        met = {None: "", True: "met", False: "NOT MET"}[result.is_met]
        wrong = "" if result.is_right else result.failure or f"WRONG {result.relative_error:.1e}"
        print(f"{name:73}{result.us or 0:10.1f}{result.floor_us:10.1f}{share:>8}  {result.bar} {met} {wrong}")
    if num_left:
        print(f"{num_left} cases were not begun: the time was over")


if __name__ == "__main__":
    sys.exit(main())
