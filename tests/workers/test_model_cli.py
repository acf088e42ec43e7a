"""`tokenmill model` as a user calls it."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from workers.model_cli import main


def test_show_counts_parameters_and_cache_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert f"{model.num_parameters():,}" in printed
    assert f"{3 * 2 * 2 * 8 * 4} bytes per token in float32" in printed  # layers × (k, v) × heads × head size × 4 bytes


def test_show_of_something_else_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 1
    assert "config.json does not exist" in capsys.readouterr().err


def test_fetch_demo_refuses_a_dtype_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch-demo", "--dest", str(tmp_path / "m"), "--dtype", "int4"]) == 1
    assert "int4" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_random_writes_what_show_and_transformers_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "m"
    sizes = ["--layers", "3", "--hidden", "32", "--kv_heads", "1", "--seed", "7"]
    assert main(["random", "--like", "qwen2", "--dest", str(dest), *sizes]) == 0
    assert AutoModelForCausalLM.from_pretrained(dest).config.num_hidden_layers == 3
    capsys.readouterr()
    assert main(["show", str(dest)]) == 0
    printed = capsys.readouterr().out
    assert "Qwen2ForCausalLM" in printed and "4, 1 for keys and values" in printed


def test_random_names_the_kinds_it_knows_and_leaves_a_full_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["random", "--like", "gpt9", "--dest", str(tmp_path / "m")]) == 1
    assert "deepseek-v3" in capsys.readouterr().err
    (tmp_path / "note").write_text("mine")
    assert main(["random", "--like", "llama", "--dest", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_wrong_argument_is_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show"]) == 2
    assert main(["melt"]) == 2
    capsys.readouterr()
