"""A model on several ranks gives the tokens of the model on one, however it is split."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.model_runner import ModelRunner
from workers.parallel_sizes import ParallelSizes
from workers.random_model import write_random_model

PROGRAM = Path(__file__).with_name("parallel_program.py")
NUM_RANKS = 4
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"like": "llama"}, "qwen2": {"like": "qwen2"}, "v2-lite": {"like": "deepseek-v2-lite"}, "v3": {"like": "deepseek-v3"},
    "v3-fp8": {"like": "deepseek-v3", "fp8": True},
}
EP: dict[str, Any] = {"tp": 4, "dp": 4, "moe_mode": "EP"}
BOTH_OVERLAPS = {"prefill_overlap": True, "decode_overlap": True}
SIZES: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2}, "tp4": {"tp": 4}, "tp4dp2": {"tp": 4, "dp": 2},
    "ep4dp4": EP, "ep4dp2": EP | {"dp": 2}, "ep4dp1": EP | {"dp": 1}, "padded": EP | {"exchange": "padded"},
    "padded-dp2": EP | {"exchange": "padded", "dp": 2},
    "overlap": EP | BOTH_OVERLAPS, "overlap-padded": EP | BOTH_OVERLAPS | {"exchange": "padded", "dp": 2},
    "rebalanced": EP | {"redundant_experts": 1, "rebalance_steps": 4},
    "all": EP | BOTH_OVERLAPS | {"redundant_experts": 1, "rebalance_steps": 3},
}
CASES = [
    ("llama", "tp2"), ("v3", "tp2"), *[(model, "tp4") for model in MODELS], ("v2-lite", "tp4dp2"), ("llama", "tp4dp2"),
    *[("v3", sizes) for sizes in SIZES if not sizes.startswith("tp")], ("v2-lite", "ep4dp4"), ("v2-lite", "all"), ("v3-fp8", "all"),
]


def load_program() -> Any:
    spec = importlib.util.spec_from_file_location("parallel_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parallel_program"] = module
    spec.loader.exec_module(module)
    return module


program = load_program()


def run_ranks(folder: Path, cases: list[dict[str, Any]], num_ranks: int = NUM_RANKS) -> list[dict[str, Any]]:
    """Each rank's results. Fails with the output of the first rank that failed."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.getcwd()}
    ranks = [subprocess.Popen([sys.executable, str(PROGRAM), str(folder), str(rank), str(num_ranks)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, env=environment) for rank in range(num_ranks)]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    failed = [(i, output) for i, (rank, output) in enumerate(zip(ranks, outputs, strict=True)) if rank.returncode]
    assert not failed, "\n".join(f"rank {i}: {output[-3000:]}" for i, output in failed)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(num_ranks)]


class Oracle:
    """One rank with the whole model."""

    def __init__(self, path: Path) -> None:
        self.runner = ModelRunner(path, "cpu", torch.float32, 40, program.PAGE_SIZE)
        self.logits = self.runner.forward(program.whole_prompt(21))
        self.tokens = cache(lambda dp_rank: program.serve(self.runner, dp_rank, program.no_agreement))


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_random_model(tmp_path_factory.mktemp("model") / name, seed=5, **kind) for name, kind in MODELS.items()}


@pytest.fixture(scope="module")
def oracles(model_dirs: dict[str, Path]) -> Any:
    return cache(lambda model: Oracle(model_dirs[model]))


@pytest.fixture(scope="module")
def computed(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """All cases in one start of the ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [{"name": f"{model}-{sizes}", "model": str(model_dirs[model]), "sizes": SIZES[sizes], "agrees": "moe_mode" in SIZES[sizes]}
             for model, sizes in CASES]
    return folder, run_ranks(folder, cases)


@pytest.mark.parametrize(("model", "sizes"), CASES)
def test_ranks_give_the_tokens_of_one(model: str, sizes: str, oracles: Any, computed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = computed
    oracle, parallel = oracles(model), ParallelSizes(**SIZES[sizes])
    for rank in range(NUM_RANKS):
        name, place = f"{model}-{sizes}", rank % parallel.tp
        torch.testing.assert_close(torch.load(folder / f"{name}-{rank}.pt"), oracle.logits, atol=1e-4, rtol=0)
        assert results[rank][name] == oracle.tokens(parallel.dp_rank(place))
