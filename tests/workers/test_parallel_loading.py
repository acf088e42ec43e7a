"""A rank reads its part of a checkpoint, and no more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.errors import ConfigError
from kernels.block_fp8 import BlockFp8
from kernels.ops import PLAIN
from workers.cut import Cut
from workers.loader import Checkpoint
from workers.model.mlp import GatedMlp
from workers.model_config import ModelConfig
from workers.model_runner import BUILDERS
from workers.parallel import Parallel, ParallelSizes, RankGroup
from workers.random_model import Overrides, write_random_model

CPU = torch.device("cpu")


def on_rank(sizes: ParallelSizes, rank: int) -> Parallel:
    """A rank that is only built, never run: it needs nobody to talk to."""
    attn = RankGroup(sizes.attn_tp_rank(rank), sizes.attn_tp)
    return Parallel(sizes=sizes, rank=rank, attn=attn, world=RankGroup(rank, sizes.tp))


def read_by(path: Path, sizes: ParallelSizes, rank: int) -> int:
    """Bytes that the model of this rank has copied out of the files."""
    config = ModelConfig.from_dir(path)
    last = [0, 0]

    def note(loaded: int, total: int) -> None:
        last[:] = loaded, total

    weights = Checkpoint(path, config, torch.float32, CPU, note)
    BUILDERS[config.architecture](weights, config, PLAIN, 2, on_rank(sizes, rank))
    weights.finish()
    assert last[0] == last[1], "what is left to other ranks must not count as missing"
    return last[0]


def bytes_of(path: Path, *parts: str) -> int:
    return sum(tensor.nbytes for name, tensor in load_file(path / "model.safetensors").items() if any(part in name for part in parts))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "deepseek-v2-lite", "deepseek-v3"])
def test_four_ranks_read_a_quarter_each_of_all_that_is_split(tmp_path: Path, kind: str) -> None:
    path = write_random_model(tmp_path, kind, Overrides(kv_heads=4))
    small = ("norm.", "mlp.gate.", "kv_a_proj", "q_a_proj")  # the same on every rank
    total, common = bytes_of(path, ""), bytes_of(path, *small)
    for rank in range(4):
        assert read_by(path, ParallelSizes(tp=4), rank) == common + (total - common) // 4


def test_key_value_heads_that_repeat_are_read_by_each_rank_that_has_them(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "llama", Overrides(kv_heads=2))
    heads = bytes_of(path, "k_proj", "v_proj")
    alone = read_by(path, ParallelSizes(tp=4), 0)
    assert alone == bytes_of(path, "norm.") + (bytes_of(path, "") - bytes_of(path, "norm.") - heads) // 4 + heads // 2


def test_experts_are_read_by_the_rank_that_has_them(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "deepseek-v3")
    experts, others = bytes_of(path, ".experts."), bytes_of(path, "") - bytes_of(path, ".experts.")
    for rank in range(4):
        assert read_by(path, ParallelSizes(tp=4, dp=4, moe_mode="EP"), rank) == others + experts // 4
        assert read_by(path, ParallelSizes(tp=4, dp=4, moe_mode="EP", redundant_experts=1), rank) == others + experts * 3 // 8


@pytest.mark.parametrize(("dim", "start", "rows", "columns"), [(0, 40, 100, 300), (1, 200, 260, 77), (0, 0, 128, 300), (1, 128, 260, 128)])
def test_a_part_of_an_fp8_matrix_is_scaled_as_the_whole(tmp_path: Path, dim: int, start: int, rows: int, columns: int) -> None:
    path = write_random_model(tmp_path, "deepseek-v3", Overrides(hidden=300, intermediate=260), fp8=True)
    name = "model.layers.0.mlp.gate_proj.weight"
    weights = Checkpoint(path, ModelConfig.from_dir(path), torch.float32, CPU)
    whole = weights.tensor(name, 260, 300)
    part = weights.tensor(name, rows, columns, cut=Cut(dim, start, whole.shape[dim]))
    assert torch.equal(part, whole.narrow(dim, start, part.shape[dim]))


def test_fp8_that_stays_fp8_is_cut_between_blocks_or_refused(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "deepseek-v3", Overrides(hidden=256, intermediate=512), fp8=True)
    weights = Checkpoint(path, ModelConfig.from_dir(path), torch.float32, CPU, keeps_fp8=True)
    name = "model.layers.0.mlp.down_proj.weight"
    whole, part = weights.linear([name], [256, 512]), weights.linear([name], [256, 256], cuts=[Cut(1, 256, 512)])
    assert isinstance(whole, BlockFp8) and isinstance(part, BlockFp8)
    assert torch.equal(part.dequantized(torch.float32), whole.dequantized(torch.float32)[:, 256:])
    with pytest.raises(ConfigError, match=r"down_proj.*not made of whole FP8 blocks of 128"):
        weights.linear([name], [256, 64], cuts=[Cut(1, 64, 512)])


def test_parts_of_a_product_add_up_and_its_bias_counts_once(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "llama")
    generator = torch.Generator().manual_seed(0)
    names = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    tensors = {f"mlp.{name}.weight": torch.randn(shape, generator=generator) for name, shape in names.items()}
    tensors |= {f"mlp.{name}.bias": torch.randn(shape[:1], generator=generator) for name, shape in names.items()}
    save_file(tensors, path / "model.safetensors")
    x = torch.randn(5, 64, generator=generator)

    def part(rank: int, size: int) -> torch.Tensor:
        weights = Checkpoint(path, ModelConfig.from_dir(path), torch.float32, CPU)
        mlp = GatedMlp(weights, "mlp", PLAIN, 64, 96, RankGroup(rank, size), has_bias=True)
        weights.finish()
        return mlp.part(x)

    torch.testing.assert_close(sum(part(rank, 4) for rank in range(4)), part(0, 1), atol=1e-4, rtol=1e-5)


def test_deepep_is_refused_where_it_is_not_installed(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "deepseek-v3")
    with pytest.raises(ConfigError, match=r"--ep_exchange deepep: the package deep_ep is not installed"):
        read_by(path, ParallelSizes(tp=4, dp=4, moe_mode="EP", exchange="deepep"), 0)
