"""What config.json says is understood whole or refused by the key's name."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import ConfigError
from workers.model_config import ModelConfig
from workers.random_model import KINDS, write_random_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 2048,
}
V3: dict[str, Any] = KINDS["deepseek-v3"].full | {"architectures": ["DeepseekV3ForCausalLM"]}


def test_the_published_v3_is_understood() -> None:
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    config = ModelConfig.parse(V3 | {"quantization_config": quantization, "torch_dtype": "bfloat16", "eos_token_id": 1})
    assert (config.kv_kind, config.kv_row, config.num_layers * config.kv_row * 2) == ("mla", 576, 70272)
    assert config.moe is not None and (config.moe.routing, config.moe.num_groups, config.moe.scaling_factor) == ("noaux_tc", 8, 2.5)
    assert (config.rope.kind, config.rope.factor, config.rope.mscale_all_dim, config.rope.interleaved) == ("yarn", 40.0, 1.0, True)
    assert (config.fp8_block, config.dtype, config.eos_ids) == ((128, 128), "bfloat16", (1,))


def test_both_spellings_of_rope_mean_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = ModelConfig.parse(LLAMA | {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **scaling}})
    new = ModelConfig.parse(LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}, "dtype": "float32"})
    assert old == new and new.rope.theta == 500000.0


def test_end_of_sequence_ids_come_from_the_generation_config_first() -> None:
    assert ModelConfig.parse(LLAMA | {"eos_token_id": 2}).eos_ids == (2,)
    assert ModelConfig.parse(LLAMA | {"eos_token_id": [2, 3]}).eos_ids == (2, 3)
    assert ModelConfig.parse(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [7, 8]}).eos_ids == (7, 8)
    assert ModelConfig.parse(LLAMA).eos_ids == ()


def test_a_config_of_grouped_query_attention_gives_its_cache_row() -> None:
    config = ModelConfig.parse(LLAMA | {"head_dim": 24})
    assert (config.kv_kind, config.kv_row) == ("gqa", 2 * 2 * 24)


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA, {"architectures": None}, "architectures"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"hidden_size": None}, "hidden_size"),
        (LLAMA, {"num_hidden_layers": "2"}, "num_hidden_layers"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"]}, {"use_sliding_window": True}, "use_sliding_window"),
        (LLAMA | {"architectures": ["Qwen2ForCausalLM"]}, {"layer_types": ["sliding_attention"]}, "layer_types"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"n_group": 7}, "n_group"),
        (V3, {"topk_group": 9}, "topk_group"),
        (V3, {"kv_lora_rank": None}, "kv_lora_rank"),
        (KINDS["deepseek-v2"].full | {"architectures": ["DeepseekV2ForCausalLM"]}, {"norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.parse(base | changes)


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("like", sorted(KINDS))
def test_every_random_kind_is_understood_from_its_folder(tmp_path: Path, like: str) -> None:
    config = ModelConfig.from_dir(write_random_model(tmp_path, like))
    assert (config.architecture, config.eos_ids) == (KINDS[like].architecture, (1,))
