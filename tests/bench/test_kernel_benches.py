"""The kernel bench and the tuner, as far as they go without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.case_check import poisoned, relative_error
from bench.kernel_result import KernelResult, slug, write_results
from bench.survivor import run_to_the_end
from bench.tables import figure

ROOT = Path(__file__).resolve().parents[2]


def result(**known: object) -> KernelResult:
    given = {"kernel": "copy", "shape": "8 GB", "num_bytes": 8_000_000_000, "num_flops": 0, "floor_us": 2000.0, "us": 2500.0, **known}
    return KernelResult(**given)  # type: ignore[arg-type]


def test_share_and_rates_follow_from_time() -> None:
    assert result().share == pytest.approx(0.8)
    assert result().gb_s == pytest.approx(3200)
    assert result(num_flops=5_000_000_000).tflops == pytest.approx(2.0)


BARS = [(">= 3,000 GB/s", True), (">= 3.3 TB/s", False), ("<= 2600 us", True), ("<= 2 ms", False), ("", None)]


@pytest.mark.parametrize(("bar", "is_met"), BARS)
def test_bars_are_read_from_their_text(bar: str, is_met: bool | None) -> None:
    assert result(bar=bar).is_met is is_met


def test_a_wrong_result_meets_no_bar() -> None:
    wrong = result(bar=">= 1 GB/s", relative_error=0.5)
    assert wrong.is_met is False and "WRONG" in wrong.line()


def test_results_of_other_cases_stay_in_the_file(tmp_path: Path) -> None:
    write_results(tmp_path, "kernels_x", {"gpu": "x"}, [result(), result(kernel="norm", failure="RuntimeError: no", us=None)])
    write_results(tmp_path, "kernels_x", {"gpu": "x"}, [result(us=2100.0)])
    cases = json.loads((tmp_path / "kernels_x.json").read_text())["cases"]
    assert {case["kernel"]: case["us"] for case in cases} == {"copy": 2100.0, "norm": None}
    assert "RuntimeError: no" in (tmp_path / "kernels_x.md").read_text()


def test_unwritten_memory_shows() -> None:
    def forgets_half() -> torch.Tensor:
        out = torch.empty(4)
        out[:2] = 1.0
        return out

    assert relative_error(poisoned(forgets_half), torch.ones(4)) == float("inf")
    assert relative_error(torch.tensor([1.0, 1.1]), torch.tensor([1.0, 1.0])) == pytest.approx(0.1 / 2**0.5, rel=1e-3)
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")


def test_winners_are_shown_fastest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = {"norm": {"T 64": [[{"num_warps": 4}, 2.0], [{"num_warps": 8}, 3.0]]}}
    (tmp_path / "tune.json").write_text(json.dumps(tuned))
    assert tune.main(["--show", str(tmp_path / "tune.json")]) == 0
    shown = capsys.readouterr().out
    assert "norm / T 64  (2 candidates)" in shown and "2.00 µs   1.00x  num_warps=4" in shown and "1.50x" in shown


def test_figures_have_three_digits() -> None:
    assert [figure(value) for value in (0.01234, 1.5, 12.34, 1234.5, None)] == ["0.0123", "1.5", "12.3", "1,234", "–"]


def test_slug_is_a_file_name() -> None:
    assert slug("NVIDIA H200 (x1)") == "nvidia_h200_x1"


def test_a_case_that_kills_its_process_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mortal.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from bench.survivor import Ledger\n"
        "ledger = Ledger(Path(sys.argv[sys.argv.index('--ledger') + 1]), time.time() + 60)\n"
        "for key in 'abc':\n"
        "    if ledger.begin(key):\n"
        "        if key == 'b': os._exit(9)\n"
        "        ledger.finish(key, {'us': 1.0})\n"
        f"Path({str(tmp_path / 'seen')!r}).write_text(repr(ledger.entries))\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert run_to_the_end("mortal", [], 60.0) == 0
    assert (tmp_path / "seen").read_text() == repr(
        {"a": {"us": 1.0}, "b": {"error": "the process died or hung in this case"}, "c": {"us": 1.0}})


AHEAD = """
import os, torch
from bench.compile_ahead import compile_launch, compile_pool, recording
from bench.offline_compile import compiling
from kernels.norm import Config, rms_norm

if __name__ == "__main__":
    x, weight = torch.randn(64, 2048, dtype=torch.bfloat16), torch.randn(2048, dtype=torch.bfloat16)
    launches = []
    for rows, num_warps in ((64, 4), (32, 4), (64, 8)):
        with recording() as seen:
            rms_norm(x[:rows], weight, 1e-6, config=Config(num_warps))
        launches += seen
    assert launches[0] != launches[1] and launches[0].specialized() == launches[1].specialized() != launches[2].specialized()
    with compile_pool(1) as pool:
        compiled = pool.submit(compile_launch, launches[0].specialized()).result()
    assert compiled.num_warps == 4 and compiled.fits, compiled
    kept = sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))
    with compiling() as again:
        rms_norm(x, weight, 1e-6, config=Config(4))
    assert again == [compiled] and sorted(os.listdir(os.environ["TRITON_CACHE_DIR"])) == kept, "compiled twice"
"""


def test_what_is_compiled_ahead_is_found_by_the_launch(tmp_path: Path) -> None:
    script = tmp_path / "ahead.py"
    script.write_text(AHEAD)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
