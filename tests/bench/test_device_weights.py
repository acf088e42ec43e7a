"""Random weights made without a file are what a model reads from one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.device_weights import RandomWeights
from bench.gpu_checkpoint import write_checkpoint
from bench.shapes import FP8, full_config
from kernels.block_fp8 import BlockFp8
from kernels.ops import ops_for
from workers.loader import Checkpoint
from workers.model_config import ModelConfig
from workers.model_runner import BUILDERS, ModelRunner
from workers.random_model import KINDS

CPU = torch.device("cpu")


def tiny(kind: str, **changes: Any) -> dict[str, Any]:
    return full_config(kind, **{**KINDS[kind].small, "torch_dtype": "float32", **changes})


def test_equal_names_give_equal_numbers_and_different_names_different_ones() -> None:
    weights = RandomWeights(ModelConfig.parse(tiny("deepseek-v2-lite")), torch.float32, CPU)
    first, second = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"
    assert torch.equal(weights.draw(first), weights.draw(first))
    assert not torch.equal(weights.draw(first), weights.draw(second))
    assert weights.draw(first).std() == pytest.approx(0.02, rel=0.1)
    assert (weights.draw("model.norm.weight") == 1).all()


@pytest.mark.parametrize("kind", ["deepseek-v2-lite", "deepseek-v3", "llama"])
def test_a_written_checkpoint_loads_and_holds_the_numbers_that_are_drawn(tmp_path: Path, kind: str) -> None:
    raw = tiny(kind)
    num_bytes = write_checkpoint(tmp_path, raw, CPU)
    weights = RandomWeights(ModelConfig.from_dir(tmp_path), torch.float32, CPU)
    assert num_bytes == weights.num_bytes
    runner = ModelRunner(tmp_path, "cpu", None, num_pages=4, page_size=16)  # refuses a checkpoint with anything missing or unknown
    runner.warmup()
    stored = Checkpoint(tmp_path, runner.config, torch.float32, CPU)
    for name, entry in weights.tensors().items():
        assert torch.equal(stored.tensor(name, *entry.shape), weights.draw(name))


@pytest.mark.parametrize("changes", [{}, {"quantization_config": FP8}])
def test_a_model_is_built_from_them_and_leaves_nothing_unread(changes: dict[str, Any]) -> None:
    config = ModelConfig.parse(tiny("deepseek-v3", **changes))
    weights = RandomWeights(config, torch.float32, CPU)
    BUILDERS[config.architecture](weights, config, ops_for(CPU), 1)
    weights.finish()


def test_fp8_weights_stay_fp8_where_that_is_asked_for() -> None:
    config = ModelConfig.parse(tiny("deepseek-v3", hidden_size=256, intermediate_size=384, quantization_config=FP8))
    kept = RandomWeights(config, torch.float32, CPU, keeps_fp8=True).linear(["model.layers.0.mlp.down_proj.weight"], [256, 384])
    assert isinstance(kept, BlockFp8) and kept.dequantized(torch.float32).std() == pytest.approx(0.02, rel=0.2)


def test_fp8_weights_come_with_block_scales_and_mean_the_same_spread() -> None:
    config = ModelConfig.parse(tiny("deepseek-v3", hidden_size=256, quantization_config=FP8))
    weights = RandomWeights(config, torch.float32, CPU)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert weights.draw(name).dtype == torch.float8_e4m3fn
    assert weights.draw(f"{name}_scale_inv").shape == (1, 2)
    assert weights.tensor(name, 96, 256).std() == pytest.approx(0.02, rel=0.2)
    assert weights.draw("lm_head.weight").dtype == torch.float32
