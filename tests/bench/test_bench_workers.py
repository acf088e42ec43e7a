"""The processes that measure and tune, from arguments to files, with the GPU's part played by the CPU."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import case_list, kernels_worker, tune_worker
from bench.gpu_timing import Timing
from bench.kernel_case import KernelCase, Prepared
from bench.roofline import Ceilings

US = {None: 50.0, 1: 40.0, 2: 30.0, 3: 35.0}  # by the number of warps; the table's has four


@dataclass(frozen=True)
class Config:
    num_warps: int


def run(config: Config | None, index: int) -> torch.Tensor:
    if config == Config(3):
        return torch.full((8,), 2.0)
    if config == Config(4):
        raise RuntimeError("out of resource: shared memory")
    return torch.empty(8).fill_(1.0)


def setup() -> Prepared:
    return Prepared(run=run, reference=lambda index: torch.ones(8), configs=[Config(n) for n in (1, 2, 3, 4)],
                    peers={"torch": lambda index: None, "absent": lambda index: 1 / 0})


def broken_setup() -> Prepared:
    raise ValueError("no such size")


def case(shape: str, make: Callable[[], Prepared] = setup) -> KernelCase:
    return KernelCase(kernel="ones", shape=shape, num_bytes=43_000_000, num_flops=0, rate="bf16", setup=make, bar=">= 800 GB/s")


def timed(call: Callable[[int], object], num_sets: int = 1, **options: object) -> Timing:
    config = next((cell.cell_contents for cell in call.__closure__ or () if isinstance(cell.cell_contents, Config)), None)
    call(0)
    return Timing(US[config.num_warps if config else None], is_graph=True)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    cases = SimpleNamespace(cases=lambda: [case("small"), case("broken", broken_setup)], __name__="cases.ones")
    monkeypatch.setattr(case_list, "case_modules", lambda: [cases])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for worker in (kernels_worker, tune_worker):
        monkeypatch.setattr(worker, "gpu_name", lambda: "Test GPU")
        monkeypatch.setattr(worker, "gpu_state", lambda: "idle")
        monkeypatch.setattr(worker, "time_call", timed)
        monkeypatch.setattr(worker, "end_if_broken", lambda error: None)
    monkeypatch.setattr(kernels_worker, "measure_ceilings", lambda: Ceilings(bytes_per_s=4.3e12))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    given = ["worker", "--out", str(tmp_path / "out"), "--ledger", str(tmp_path / "ledger.json"), "--deadline", "9e9"]
    monkeypatch.setattr("sys.argv", given)
    return given


def test_kernels_are_measured_and_a_broken_case_is_reported(arguments: list[str], tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels_worker.main() == 0
    cases = {entry["shape"]: entry for entry in json.loads((tmp_path / "out/kernels_test_gpu.json").read_text())["cases"]}
    small, broken = cases["small"], cases["broken"]
    assert (small["us"], small["floor_us"], small["relative_error"], small["is_met"]) == (50.0, pytest.approx(10.0), 0.0, True)
    assert small["peers"] == {"torch": 50.0, "absent": "ZeroDivisionError: division by zero"}
    assert broken["us"] is None and broken["failure"] == "ValueError: no such size"
    assert "ones / small" in capsys.readouterr().out


def test_a_second_worker_goes_on_behind_what_the_first_has_measured(arguments: list[str], tmp_path: Path) -> None:
    kernels_worker.main()
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    ledger["ones / small"] |= {"us": 7.0}
    (tmp_path / "ledger.json").write_text(json.dumps(ledger))
    kernels_worker.main()
    cases = json.loads((tmp_path / "out/kernels_test_gpu.json").read_text())["cases"]
    assert [entry["us"] for entry in cases] == [7.0, None]


@pytest.mark.parametrize("is_ahead", [False, True])
def test_the_tuner_keeps_what_is_right_fastest_first(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ahead: bool,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune_worker, "can_compile_ahead", lambda: is_ahead)
    monkeypatch.setattr("sys.argv", [*arguments, "--jobs", "1"])
    assert tune_worker.main() == 0
    tuned = json.loads((tmp_path / "out/tune_test_gpu.json").read_text())
    assert tuned == {"ones": {"small": [[{"num_warps": 2}, 30.0], [{"num_warps": 1}, 40.0]]}}
    shown = capsys.readouterr().out
    assert "wrong: relative error" in shown and "out of resource" in shown and "no such size" in shown
    assert "50.00 µs  the table's" in shown and "2 of 4" in shown
