"""Finds the kernels' cases. A module that cannot be imported is told about and left out: it must not cost the others' figures."""

import importlib
import pkgutil
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

import bench.cases
from bench.kernel_case import KernelCase


def key_of(case: KernelCase) -> str:
    return f"{case.kernel} / {case.shape}"


def find_cases(only: Sequence[str] = ()) -> list[KernelCase]:
    """All cases, or those whose key (`kernel / shape`) contains one of the words of `only`."""
    cases: list[KernelCase] = []
    for module in case_modules():
        try:
            cases += module.cases()
        except Exception:
            print(f"{module.__name__}: no cases, because\n{traceback.format_exc(limit=-2)}", flush=True)
    return [case for case in cases if not only or any(word in key_of(case) for word in only)]


def case_modules() -> Iterator[ModuleType]:
    for info in sorted(pkgutil.iter_modules(bench.cases.__path__), key=lambda info: info.name):
        name = f"{bench.cases.__name__}.{info.name}"
        try:
            yield importlib.import_module(name)
        except Exception:
            print(f"{name}: left out, because\n{traceback.format_exc(limit=-2)}", flush=True)
