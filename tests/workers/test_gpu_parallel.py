"""Two GPUs over NCCL give the logits of one: split layers, spread experts, halves in turns, all in CUDA graphs."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.random_model import Overrides, write_random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

FOLDER = Path(__file__).parent
V3 = {"layers": 5, "hidden": 1024, "intermediate": 2048, "heads": 16, "experts": 32, "vocab": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"like": "llama", "overrides": Overrides(layers=4, hidden=1024, intermediate=2048, heads=16, kv_heads=4, vocab=4096)},
    "v2-lite": {"like": "deepseek-v2-lite", "overrides": Overrides(layers=4, hidden=1024, intermediate=2048, experts=32, vocab=4096)},
    "v3": {"like": "deepseek-v3", "overrides": Overrides(**V3)},
    "v3-fp8": {"like": "deepseek-v3", "overrides": Overrides(**V3), "fp8": True},
}
EP: dict[str, Any] = {"tp": 2, "dp": 2, "moe_mode": "EP"}
OVERLAPS = {"prefill_overlap": True, "decode_overlap": True}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"tp2": {"tp": 2}, "tp2 one shot": {"tp": 2, "one_shot_bytes": 1 << 18}},
    "v2-lite": {"tp2": {"tp": 2}, "ep2": EP},
    "v3": {"tp2": {"tp": 2}, "ep2": EP, "ep2 dp1": EP | {"dp": 1}, "overlaps": EP | OVERLAPS},
    "v3-fp8": {"tp2": {"tp": 2}, "ep2": EP, "rebalanced": EP | OVERLAPS | {"redundant_experts": 2, "rebalance_steps": 4}},
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", MODELS)
def test_two_gpus_give_the_logits_of_one(tmp_path: Path, model: str) -> None:
    spec = importlib.util.spec_from_file_location("ranks", FOLDER / "ranks.py")
    assert spec is not None and spec.loader is not None
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    kind = MODELS[model]
    path = write_random_model(tmp_path / model, kind["like"], kind["overrides"], seed=1, dtype="bfloat16", full=True,
                              fp8=kind.get("fp8", False))
    cases = [{"name": f"{model} {name}", "model": str(path), "sizes": sizes} for name, sizes in SIZES[model].items()]
    results = ranks.run_ranks(FOLDER / "parallel_gpu_program.py", tmp_path, cases, 2, timeout_s=560)
    for name, figures in results[0].items():
        alone, together = figures["alone"], figures["together"]
        pairs = ", ".join(f"{kind} {alone[kind]:.2f} {together[kind]:.2f}" for kind in alone)
        print(f"{name:20} distance {figures['distance']:.1e}; ms of a step on one GPU and on two: {pairs}")
