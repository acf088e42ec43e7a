"""The process that tunes for `bench.tune`; a candidate that kills it is left out by the next one.

    for every case: set up, note the launches of all candidates, hand them to the compile pool, forget the tensors
    for every case: set up again, and for each candidate wait for its compilation, check it, time it
"""

import gc
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case_check import poisoned, relative_error
from bench.case_list import find_cases, key_of
from bench.ceilings import gpu_name, gpu_state
from bench.compile_ahead import Launch, can_compile_ahead, compile_launch, compile_pool, recording
from bench.gpu_timing import time_call
from bench.kernel_case import KernelCase, Prepared
from bench.kernel_result import slug
from bench.offline_compile import Compiled
from bench.survivor import Ledger, end_if_broken, first_line, write_json
from bench.tune import SHOWN, Tuned, config_text, parser

TABLE = "(the table's)"
QUICK_S, CAREFUL_S = 0.02, 0.12
COMPILE_WAIT_S = 120.0


@dataclass(slots=True)
class Candidates:
    """One case's configurations with the launches that each makes; the compilations of a launch are shared by all that make it."""

    case: KernelCase
    configs: list[Any]
    launches: dict[int, list[Launch]] = field(default_factory=dict)  # by place in `configs`
    table: list[Launch] | None = None


def main() -> int:
    made = parser()
    made.add_argument("--ledger", type=Path, required=True)
    made.add_argument("--deadline", type=float, required=True)
    arguments = made.parse_args()
    ledger = Ledger(arguments.ledger, arguments.deadline)
    started = time.time()
    print(gpu_state())
    cases = find_cases([word for word in arguments.only.split(",") if word])
    ahead = arguments.jobs > 0 and can_compile_ahead()
    with compile_pool(arguments.jobs) if ahead else nullcontext() as pool, torch.inference_mode():
        compilations: dict[Launch, Future[Compiled | str]] = {}
        todo = []
        for case in cases:
            candidates = _candidates(case, arguments.most_configs, ledger, is_noted=pool is not None)
            if candidates is None:
                continue
            todo.append(candidates)
            if pool is not None:
                _submit(pool, candidates, compilations)
        num_configs = sum(len(candidates.configs) for candidates in todo)
        print(f"{len(todo)} cases, {num_configs} candidates, {len(compilations)} kernels to compile, {time.time() - started:.0f} s")
        for number, candidates in enumerate(todo):
            if ledger.is_time_over:
                print(f"the time is over: {len(todo) - number} cases are not begun or not finished")
                break
            print(f"[{number + 1}/{len(todo)}, {time.time() - started:.0f} s] {key_of(candidates.case)}")
            _tune(candidates, compilations, ledger)
            path = arguments.out / f"tune_{slug(gpu_name())}.json"
            write_json(path, _merged(path, _tuned(todo, ledger)))
    return 0


def _candidates(case: KernelCase, most: int, ledger: Ledger, *, is_noted: bool) -> Candidates | None:
    """None if there is nothing (left) to try."""
    if ledger.is_time_over or "error" in ledger.entries.get(key_of(case), {}):
        return None
    ledger.begin(key_of(case))
    try:
        with _released():
            prepared = case.setup()
            found = Candidates(case, list(prepared.configs)[:most])
            if is_noted and found.configs:
                _note_launches(found, prepared)
            del prepared
    except Exception as error:
        end_if_broken(error)
        print(f"{key_of(case)}: left out: {first_line(error)}")
        ledger.finish(key_of(case), {"error": first_line(error)})
        return None
    ledger.finish(key_of(case), {})
    return found if found.configs else None


def _note_launches(candidates: Candidates, prepared: Prepared) -> None:
    for place, config in [(None, None), *enumerate(candidates.configs)]:
        try:
            with recording() as launches:
                prepared.run(config, 0)
        except Exception as error:  # it will fail in place as well, and say there why
            end_if_broken(error)
            continue
        if place is None:
            candidates.table = launches
        else:
            candidates.launches[place] = launches


def _submit(pool: Executor, candidates: Candidates, compilations: dict[Launch, Future[Compiled | str]]) -> None:
    for launches in (candidates.table or [], *candidates.launches.values()):
        for launch in launches:
            special = launch.specialized()
            if special not in compilations:
                compilations[special] = pool.submit(compile_launch, special)


def _tune(candidates: Candidates, compilations: dict[Launch, Future[Compiled | str]], ledger: Ledger) -> None:
    case = candidates.case
    try:
        with _released():
            prepared = case.setup()
            reference = prepared.reference(0) if prepared.reference else None
            _try_all(candidates, prepared, reference, compilations, ledger)
            del prepared, reference
    except Exception as error:
        end_if_broken(error)
        print(f"    failed: {first_line(error)}")
    entries = _of_case(candidates, ledger)
    for entry in [each for each in entries if "error" in each][:4]:
        print(f"    dropped {config_text(entry['config'])}: {entry['error']}")
    right = sorted((entry for entry in entries if "us" in entry), key=lambda entry: entry["us"])
    for entry in right[:SHOWN]:
        print(f"    {entry['us']:9.2f} µs  {config_text(entry['config'])}  {entry.get('compiled', '')}")
    table = ledger.entries.get(_config_key(case, TABLE), {})
    which = table.get("error") or table.get("which") or "not among the candidates"
    print(f"    {table.get('us', float('nan')):9.2f} µs  the table's: {which}; {len(right)} of {len(candidates.configs)} are right")


def _try_all(candidates: Candidates, prepared: Prepared, reference: Tensor | None, compilations: dict[Launch, Future[Compiled | str]],
             ledger: Ledger) -> None:
    case = candidates.case
    for place, config in enumerate(candidates.configs):
        key = _config_key(case, config)
        if not ledger.begin(key):
            continue
        launches = candidates.launches.get(place, [])
        entry: dict[str, Any] = {"config": config_dict(config)}
        try:
            entry["compiled"] = _wait(launches, compilations)
            entry |= _tried(case, prepared, config, reference, QUICK_S)
        except Exception as error:
            entry["error"] = first_line(error)
            ledger.finish(key, entry)
            end_if_broken(error)
        ledger.finish(key, entry)
    best = sorted((entry for entry in _of_case(candidates, ledger) if "us" in entry), key=lambda entry: entry["us"])[:SHOWN]
    by_text = {config_text(config_dict(config)): config for config in candidates.configs}
    for entry in best:
        if not ledger.is_time_over:
            config = by_text[config_text(entry["config"])]
            entry["us"] = time_call(_caller(prepared, config), prepared.num_sets, budget_s=CAREFUL_S).us
    if ledger.begin(_config_key(case, TABLE)):
        chosen = [config for place, config in enumerate(candidates.configs) if candidates.launches.get(place) == candidates.table]
        entry = {"which": config_text(config_dict(chosen[0])) if chosen and candidates.table else ""}
        try:
            entry |= _tried(case, prepared, None, reference, CAREFUL_S)
        except Exception as error:
            entry["error"] = first_line(error)
            ledger.finish(_config_key(case, TABLE), entry)
            end_if_broken(error)
        ledger.finish(_config_key(case, TABLE), entry)


def _tried(case: KernelCase, prepared: Prepared, config: Any, reference: Tensor | None, budget_s: float) -> dict[str, Any]:
    if reference is not None:
        error = relative_error(poisoned(lambda: prepared.run(config, 0)), reference)
        if not error <= case.max_error:
            return {"error": f"wrong: relative error {error:.1e}"}
    return {"us": time_call(_caller(prepared, config), prepared.num_sets, budget_s=budget_s).us}


def _caller(prepared: Prepared, config: Any) -> Any:
    return lambda index: prepared.run(config, index)


def _wait(launches: list[Launch], compilations: dict[Launch, Future[Compiled | str]]) -> str:
    """What the assembler says of the kernels. Raises ValueError for one that does not compile or does not fit."""
    said = []
    for launch in launches:
        future = compilations.get(launch.specialized())
        if future is None:
            continue
        try:
            compiled = future.result(COMPILE_WAIT_S)
        except Exception as error:  # a compiler that died or takes too long: compiled in place, which tells
            said.append(f"not compiled ahead ({type(error).__name__})")
            continue
        if isinstance(compiled, str):
            raise ValueError(f"{launch.kernel.name} does not compile: {compiled}")
        if not compiled.fits:
            raise ValueError(f"{launch.kernel.name} needs {compiled.shared_bytes} bytes of shared memory")
        spills = f" SPILLS {compiled.spilled_bytes}" if compiled.spilled_bytes else ""
        said.append(f"{compiled.registers}r/{compiled.shared_bytes >> 10}K{spills}")
    return ", ".join(said)


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return dict(config) if isinstance(config, dict) else {"config": str(config)}


def _config_key(case: KernelCase, config: Any) -> str:
    return f"{key_of(case)} | {config if isinstance(config, str) else config_text(config_dict(config))}"


def _of_case(candidates: Candidates, ledger: Ledger) -> list[dict[str, Any]]:
    found = []
    for config in candidates.configs:
        entry = ledger.entries.get(_config_key(candidates.case, config))
        if entry is not None:
            entry.setdefault("config", config_dict(config))
            found.append(entry)
    return found


def _tuned(todo: list[Candidates], ledger: Ledger) -> Tuned:
    tuned: Tuned = {}
    for candidates in todo:
        entries = sorted((entry for entry in _of_case(candidates, ledger) if "us" in entry), key=lambda entry: entry["us"])
        if entries:
            tuned.setdefault(candidates.case.kernel, {})[candidates.case.shape] = [[e["config"], round(e["us"], 3)] for e in entries]
    return tuned


def _merged(path: Path, tuned: Tuned) -> Tuned:
    """What an earlier run wrote about other cases is kept."""
    try:
        older: Tuned = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return tuned
    return {kernel: older.get(kernel, {}) | tuned.get(kernel, {}) for kernel in {**older, **tuned}}


@contextmanager
def _released() -> Iterator[None]:
    """Device memory of a case is free again behind the block."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
