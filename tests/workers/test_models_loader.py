"""Weights are read as they are stored, or the model is refused with the tensor's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coordinator.errors import ConfigError
from kernels.block_fp8 import BlockFp8
from workers import random_model
from workers.batch import ForwardBatch
from workers.loader import Checkpoint, weights_hash
from workers.model_config import ModelConfig
from workers.model_runner import ModelRunner
from workers.random_model import Overrides, write_random_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def v3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("v3"), "deepseek-v3", seed=2)


def load(model_dir: Path, **options: object) -> ModelRunner:
    return ModelRunner(model_dir, "cpu", torch.float32, 8, 8, **options)  # type: ignore[arg-type]


def logits_of(runner: ModelRunner) -> Tensor:
    rows = list(range(20))
    return runner.forward(ForwardBatch([7 * i + 3 for i in rows], rows, rows, [20], [20], [[0, 1, 2]], rows))


def changed_copy(source: Path, dest: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, dest)
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, dest / WEIGHTS)
    return dest


def test_progress_ends_at_the_size_of_all_tensors(v3_dir: Path) -> None:
    calls: list[tuple[int, int]] = []
    load(v3_dir, load_workers=4, progress=lambda loaded, total: calls.append((loaded, total)))
    total = sum(tensor.nbytes for tensor in load_file(v3_dir / WEIGHTS).values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_shards_give_the_same_model_as_one_file(v3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "SHARD_BYTES", 100_000)
    sharded = write_random_model(tmp_path, "deepseek-v3", seed=2)
    assert len(list(sharded.glob("*.safetensors"))) > 3 and not (sharded / WEIGHTS).exists()
    torch.testing.assert_close(logits_of(load(sharded)), logits_of(load(v3_dir)), atol=0, rtol=0)


def test_tensors_that_inference_does_not_use_are_skipped(v3_dir: Path, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.layers.3.eh_proj.weight": torch.ones(4, 4)}
    model_dir = changed_copy(v3_dir, tmp_path / "m", lambda tensors: tensors.update(extra))
    torch.testing.assert_close(logits_of(load(model_dir)), logits_of(load(v3_dir)), atol=0, rtol=0)


def test_an_fp8_checkpoint_equals_its_dequantized_weights(v3_dir: Path, tmp_path: Path) -> None:
    block = 16
    exact: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors[name]
            rows, columns = weight.shape
            padded = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
            blocks = padded.view(padded.shape[0] // block, block, -1, block)
            scale = blocks.abs().amax((1, 3)) / 448
            quantized = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            exact[name] = (quantized.float() * scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
            tensors[name] = quantized.view(padded.shape)[:rows, :columns]
            tensors[f"{name}_scale_inv"] = scale

    quantized_dir = changed_copy(v3_dir, tmp_path / "fp8", quantize)
    config = json.loads((quantized_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (quantized_dir / "config.json").write_text(json.dumps(config))
    exact_dir = changed_copy(v3_dir, tmp_path / "exact", lambda tensors: tensors.update(exact))
    torch.testing.assert_close(logits_of(load(quantized_dir)), logits_of(load(exact_dir)), atol=0, rtol=0)


@pytest.fixture(scope="module")
def fp8_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 hidden, so that weights have several blocks; the experts' rows are fewer than a block's."""
    return write_random_model(tmp_path_factory.mktemp("fp8"), "deepseek-v3", Overrides(hidden=256, intermediate=384), seed=2, fp8=True)


def checkpoint(model_dir: Path, *, keeps_fp8: bool) -> Checkpoint:
    return Checkpoint(model_dir, ModelConfig.from_dir(model_dir), torch.float32, torch.device("cpu"), keeps_fp8=keeps_fp8)


def names_of_mlp(*kinds: str) -> list[str]:
    return [f"model.layers.0.mlp.{kind}_proj.weight" for kind in kinds]


def test_fp8_weights_are_handed_out_as_stored_where_they_can_be(fp8_dir: Path) -> None:
    kept, wide = checkpoint(fp8_dir, keeps_fp8=True), checkpoint(fp8_dir, keeps_fp8=False)
    for names, shape, rows in ((names_of_mlp("gate", "up"), [768, 256], [384, 384]), (names_of_mlp("down"), [256, 384], None)):
        weight, expected = kept.linear(names, shape, rows=rows), wide.linear(names, shape, rows=rows)
        assert isinstance(weight, BlockFp8) and isinstance(expected, Tensor)
        torch.testing.assert_close(weight.dequantized(torch.float32), expected, atol=0, rtol=0)


def test_only_the_last_of_stacked_parts_may_end_within_a_block(fp8_dir: Path) -> None:
    prefix = "model.layers.0.self_attn"
    latents = [f"{prefix}.q_a_proj.weight", f"{prefix}.kv_a_proj_with_mqa.weight"]      # 24 and 48 rows
    assert isinstance(checkpoint(fp8_dir, keeps_fp8=True).linear(latents, [72, 256], rows=[24, 48]), Tensor)
    assert isinstance(checkpoint(fp8_dir, keeps_fp8=True).linear(latents[1:], [48, 256]), BlockFp8)
    mixed = [*names_of_mlp("gate"), latents[1]]
    weight = checkpoint(fp8_dir, keeps_fp8=True).linear(mixed, [432, 256], rows=[384, 48])
    assert isinstance(weight, BlockFp8) and weight.scale.shape == (4, 2)


def test_fp8_weights_whose_rows_end_within_a_block_are_dequantized(fp8_dir: Path) -> None:
    down = ["model.layers.1.mlp.experts.0.down_proj.weight"]                            # 32 columns
    assert isinstance(checkpoint(fp8_dir, keeps_fp8=True).linear(down, [256, 32]), Tensor)
    assert isinstance(checkpoint(fp8_dir, keeps_fp8=True).linears([down, down], [2, 256, 32]), Tensor)


def test_matrices_of_one_shape_are_stacked_with_their_scales(fp8_dir: Path) -> None:
    names = [names_of_mlp("gate", "up"), names_of_mlp("up", "gate")]
    kept = checkpoint(fp8_dir, keeps_fp8=True).linears(names, [2, 768, 256], rows=[384, 384])
    wide = checkpoint(fp8_dir, keeps_fp8=False).linears(names, [2, 768, 256], rows=[384, 384])
    assert isinstance(kept, BlockFp8) and isinstance(wide, Tensor) and kept.scale.shape == (2, 6, 2)
    torch.testing.assert_close(kept.dequantized(torch.float32), wide, atol=0, rtol=0)
    assert torch.equal(wide[0, :384], wide[1, 384:]) and not torch.equal(wide[0, :384], wide[0, 384:])


def test_weights_that_are_not_fp8_stay_what_they_are(v3_dir: Path, fp8_dir: Path) -> None:
    assert isinstance(checkpoint(v3_dir, keeps_fp8=True).linear(names_of_mlp("down"), [64, 96]), Tensor)
    assert isinstance(checkpoint(fp8_dir, keeps_fp8=True).linear(["lm_head.weight"], [512, 256]), Tensor)
    with pytest.raises(ConfigError, match=r"gate_proj\.weight has shape"):
        checkpoint(fp8_dir, keeps_fp8=True).linear(names_of_mlp("gate"), [256, 256])
    with pytest.raises(ConfigError, match="is missing"):
        checkpoint(fp8_dir, keeps_fp8=True).linear(["model.layers.0.nothing.weight"], [256, 256])


def test_a_cpu_runs_an_fp8_checkpoint_on_its_dequantized_weights(fp8_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "workers.loader"):
        runner = load(fp8_dir)
    assert logits_of(runner).isfinite().all()
    assert [record for record in caplog.messages if record.startswith("read 0.0") and record.endswith("GB/s)")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"experts\.3\.up_proj\.weight is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight has shape \[3\], the model needs \[64\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}), r"does not know.*q_proj\.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), r"model\.norm\.weight is of type I32"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), r"lm_head\.weight is fp8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(v3_dir: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object],
                                             message: str) -> None:
    model_dir = changed_copy(v3_dir, tmp_path / "m", change)
    with pytest.raises(ConfigError, match=message):
        load(model_dir, load_workers=3)


def test_damaged_files_are_refused(v3_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "m"
    shutil.copytree(v3_dir, model_dir)
    whole = (model_dir / WEIGHTS).read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"\xff" * 64):
        (model_dir / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ConfigError, match=WEIGHTS):
            load(model_dir)
    (model_dir / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="neither"):
        load(model_dir)


def test_an_index_may_only_name_files_of_its_folder(v3_dir: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "m"
    shutil.copytree(v3_dir, model_dir)
    index = model_dir / "model.safetensors.index.json"
    for weight_map in ({"lm_head.weight": "../x.safetensors"}, {"not.there": WEIGHTS}, ["a"]):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigError, match="index"):
            load(model_dir)


def test_the_hash_tells_models_apart_and_is_the_same_for_copies(v3_dir: Path, tmp_path: Path) -> None:
    copied = changed_copy(v3_dir, tmp_path / "same", lambda tensors: None)
    assert weights_hash(copied) == weights_hash(copied) and len(weights_hash(copied)) == 16
    assert weights_hash(write_random_model(tmp_path / "again", "deepseek-v3", seed=2)) == weights_hash(v3_dir)
    assert weights_hash(write_random_model(tmp_path / "other", "deepseek-v3", seed=3)) != weights_hash(v3_dir)
    config = json.loads((copied / "config.json").read_text())
    before = weights_hash(copied)
    (copied / "config.json").write_text(json.dumps(config | {"rope_theta": 9999}))
    assert weights_hash(copied) != before
