"""Random checkpoints: reproducible, of the official form, with a tokenizer that takes any text."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from coordinator.errors import ConfigError
from kernels.block_fp8 import BlockFp8
from workers.model_config import ModelConfig
from workers.random_model import KINDS, Overrides, tensor_shapes, write_random_model


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("llama"), "llama")


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(llama_dir: Path, tmp_path: Path) -> None:
    for folder, seed in (("same", 0), ("other", 1)):
        write_random_model(tmp_path / folder, "llama", seed=seed)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "same" / file).read_bytes() == (llama_dir / file).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (llama_dir / "model.safetensors").read_bytes()


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    tensors = load_file(write_random_model(tmp_path, "deepseek-v3") / "model.safetensors")
    drawn = [tensor.flatten()[:8] for name, tensor in tensors.items() if not name.endswith("norm.weight")]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_sizes_can_be_changed_and_dtype_is_kept(tmp_path: Path) -> None:
    sizes = Overrides(layers=4, hidden=96, heads=6, experts=16, vocab=300)
    path = write_random_model(tmp_path, "deepseek-v2", sizes, dtype="bfloat16")
    config = ModelConfig.from_dir(path)
    assert config.moe is not None
    assert (config.num_layers, config.hidden_size, config.num_heads, config.moe.num_experts, config.vocab_size) == (4, 96, 6, 16, 300)
    assert load_file(path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_fp8_checkpoints_are_those_of_deepseek(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "deepseek-v3", Overrides(hidden=256), dtype="bfloat16", fp8=True)
    tensors = load_file(path / "model.safetensors")
    assert ModelConfig.from_dir(path).fp8_block == (128, 128)
    quantized = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name in tensors if "_proj" in name and name.endswith(".weight")}
    assert {f"{name}_scale_inv" for name in quantized} == {name for name in tensors if name.endswith("_scale_inv")}
    assert tensors["model.layers.1.mlp.gate.weight"].dtype == tensors["lm_head.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (2, 1)
    plain = load_file(write_random_model(tmp_path / "plain", "deepseek-v3", Overrides(hidden=256)) / "model.safetensors")
    weight = BlockFp8(*(tensors[f"model.layers.0.mlp.down_proj.weight{kind}"] for kind in ("", "_scale_inv")))
    expected = plain["model.layers.0.mlp.down_proj.weight"]
    assert (weight.dequantized(torch.float32) - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize(
    ("like", "billions"), [("deepseek-v2-lite", 15.7), ("deepseek-v2", 235.7), ("deepseek-v3", 671.0), ("llama", 8.03), ("qwen2", 7.62)]
)
def test_full_sizes_are_those_of_the_published_models(like: str, billions: float) -> None:
    config = ModelConfig.parse(KINDS[like].full | {"architectures": [KINDS[like].architecture]})
    count = 0
    for _, shape in tensor_shapes(config):
        size = 1
        for extent in shape:
            size *= extent
        count += size
    assert count / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("like", ["gpt2", "deepseek-v4"])
def test_an_unknown_kind_is_refused_with_the_choices(tmp_path: Path, like: str) -> None:
    with pytest.raises(ConfigError, match="deepseek-v3"):
        write_random_model(tmp_path, like)


def test_a_vocabulary_too_small_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="258"):
        write_random_model(tmp_path, "llama", Overrides(vocab=200))


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_from_its_tokens(llama_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(llama_dir / "tokenizer.json"))
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 0 and max(encoded.ids) < 512
    assert tokenizer.decode(encoded.ids) == text


def test_the_tokenizer_has_exactly_the_vocabulary_of_the_model(tmp_path: Path) -> None:
    path = write_random_model(tmp_path, "llama", Overrides(vocab=3000))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 3000
    assert all(tokenizer.id_to_token(i) for i in range(3000))


def test_transformers_reads_the_tokenizer_and_its_chat_template(llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert (text, tokenizer.eos_token_id) == ("<|begin|>user: hi\nassistant:", 1)
    assert json.loads((llama_dir / "generation_config.json").read_text())["eos_token_id"] == 1
