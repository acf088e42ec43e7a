"""A model on several ranks gives the tokens of the model on one, however it is split."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.model_runner import ModelRunner
from workers.parallel_sizes import ParallelSizes
from workers.random_model import Overrides, write_random_model

FOLDER = Path(__file__).parent
NUM_RANKS = 4


def load(name: str) -> Any:
    """A module beside this file: tests are no packages."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"like": "llama"},
    "qwen2": {"like": "qwen2", "overrides": Overrides(tied=True, vocab=514)},  # the last rank's rows of the vocabulary end in padding
    "v2-lite": {"like": "deepseek-v2-lite"},
    "v3": {"like": "deepseek-v3"},
    "v3-fp8": {"like": "deepseek-v3", "fp8": True},
}
EP: dict[str, Any] = {"tp": 4, "dp": 4, "moe_mode": "EP"}
BOTH_OVERLAPS = {"prefill_overlap": True, "decode_overlap": True}
SIZES: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2}, "tp4": {"tp": 4}, "tp4dp2": {"tp": 4, "dp": 2},
    "ep4dp4": EP, "ep4dp2": EP | {"dp": 2}, "padded": EP | {"exchange": "padded"},
    "padded-dp2": EP | {"exchange": "padded", "dp": 2},
    "overlap": EP | BOTH_OVERLAPS, "overlap-padded": EP | BOTH_OVERLAPS | {"exchange": "padded", "dp": 1},
    "rebalanced": EP | {"redundant_experts": 1, "rebalance_steps": 4},
    "all": EP | BOTH_OVERLAPS | {"redundant_experts": 1, "rebalance_steps": 3},
}
CASES = [
    ("llama", "tp2"), ("v3", "tp2"), *[(model, "tp4") for model in MODELS], ("v2-lite", "tp4dp2"),
    *[("v3", sizes) for sizes in SIZES if not sizes.startswith("tp")], ("v2-lite", "all"),
]


program = load("parallel_program")
ranks = load("ranks")


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
    cases = [{"name": f"{model}-{sizes}", "model": str(model_dirs[model]), "sizes": SIZES[sizes], "agrees": SIZES[sizes].get("dp", 1) > 1}
             for model, sizes in CASES]
    return folder, ranks.run_ranks(FOLDER / "parallel_program.py", folder, cases, NUM_RANKS)


@pytest.mark.parametrize(("model", "sizes"), CASES)
def test_ranks_give_the_tokens_of_one(model: str, sizes: str, oracles: Any, computed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = computed
    oracle, parallel = oracles(model), ParallelSizes(**SIZES[sizes])
    for rank in range(NUM_RANKS):
        name, place = f"{model}-{sizes}", rank % parallel.tp
        torch.testing.assert_close(torch.load(folder / f"{name}-{rank}.pt"), oracle.logits, atol=1e-4, rtol=0)
        assert results[rank][name]["tokens"] == oracle.tokens(parallel.dp_rank(place))
        assert (results[rank][name]["num_moved"] > 0) == (parallel.rebalance_steps > 0)


@pytest.mark.chaos
def test_the_executor_for_gpus_gives_the_same_on_two_ranks(tmp_path: Path) -> None:
    """In Triton's interpreter, over gloo: minutes."""
    small = Overrides(layers=2)
    cases = [{"model": str(write_random_model(tmp_path / like, like, small, seed=3)), "sizes": sizes} for like, sizes in [
        ("llama", {"tp": 2}), ("deepseek-v2-lite", {"tp": 2}), ("deepseek-v3", {"tp": 2, "dp": 2, "moe_mode": "EP"}),
        ("deepseek-v3", {"tp": 2, "moe_mode": "EP", "prefill_overlap": True, "decode_overlap": True}),
    ]]
    ranks.run_ranks(FOLDER / "parallel_executor_program.py", tmp_path, cases, 2, TRITON_INTERPRET="1")
