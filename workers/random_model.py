"""Random checkpoints of the true architectures: small ones for tests, full-size shapes for benchmarks.

Written as the published models are: config.json, generation_config.json, safetensors with the official names, and a tokenizer of
the model's vocabulary. The same arguments give the same bytes.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from coordinator.errors import ConfigError
from kernels.block_fp8 import BLOCK, quantize
from workers.loader import INDEX, SCALE_SUFFIX, SINGLE
from workers.model_config import DTYPES, ModelConfig
from workers.random_tokenizer import BOS_ID, EOS_ID, write_tokenizer

SHARD_BYTES = 4 * 1024**3
FULL_STD = 0.02

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK_FULL: dict[str, Any] = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1, "rope_theta": 10000,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "attention_bias": False,
}
DEEPSEEK_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 512, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "max_position_embeddings": 2560,
}
GROUPS_SMALL: dict[str, Any] = {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}
LLAMA_SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 2048,
}


FP8_CONFIG: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


@dataclass(frozen=True, slots=True)
class Kind:
    """One published architecture: what it is at full size, and what differs in a small one."""

    architecture: str
    model_type: str
    full: dict[str, Any]
    small: dict[str, Any]


KINDS: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    }, LLAMA_SMALL),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "use_sliding_window": False,
    }, LLAMA_SMALL),
    "deepseek-v2-lite": Kind("DeepseekV2ForCausalLM", "deepseek_v2", DEEPSEEK_FULL | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 102400, "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }, DEEPSEEK_SMALL),
    "deepseek-v2": Kind("DeepseekV2ForCausalLM", "deepseek_v2", DEEPSEEK_FULL | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_key_value_heads": 128, "vocab_size": 102400, "q_lora_rank": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    }, DEEPSEEK_SMALL | GROUPS_SMALL),
    "deepseek-v3": Kind("DeepseekV3ForCausalLM", "deepseek_v3", DEEPSEEK_FULL | {
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    }, DEEPSEEK_SMALL | GROUPS_SMALL),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """Sizes to change; None keeps the kind's own."""

    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    vocab: int | None = None
    max_position: int | None = None
    tied: bool | None = None


OVERRIDE_KEYS = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size",
                 "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "experts": "n_routed_experts", "vocab": "vocab_size",
                 "max_position": "max_position_embeddings", "tied": "tie_word_embeddings"}


def write_random_model(path: Path, like: str, overrides: Overrides | None = None, *, seed: int = 0, dtype: str = "float32",
                       full: bool = False, fp8: bool = False) -> Path:
    """Write a checkpoint to the folder `path` (made if need be) and return it.

    like   one of KINDS
    full   the published sizes, weights normal(0, 0.02); otherwise tiny with every feature, weights spread so that layers matter
    fp8    the projections of attention and feed-forward blocks as DeepSeek-V3 stores them: e4m3 with block scales; the rest in dtype
    Raises ConfigError for an unknown kind, dtype or sizes that do not fit together.
    """
    if like not in KINDS or dtype not in DTYPES:
        raise ConfigError(f"no random model like {like!r} in {dtype!r}: choose from {', '.join(KINDS)} and {', '.join(DTYPES)}")
    config = _config(KINDS[like], overrides or Overrides(), dtype, full=full)
    if fp8:
        config["quantization_config"] = FP8_CONFIG
    parsed = ModelConfig.parse(config)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    _write_shards(path, parsed, seed, getattr(torch, dtype), FULL_STD if full else None)
    write_tokenizer(path, parsed.vocab_size, parsed.max_position)
    return path


def _config(kind: Kind, overrides: Overrides, dtype: str, *, full: bool) -> dict[str, Any]:
    config = kind.full | ({} if full else kind.small)
    config |= {OVERRIDE_KEYS[name]: value for name, value in asdict(overrides).items() if value is not None}
    if "kv_lora_rank" in config or (overrides.kv_heads is None and config["num_attention_heads"] % config["num_key_value_heads"]):
        config["num_key_value_heads"] = config["num_attention_heads"]
    if not full and "rope_scaling" in config:  # so that small positions already reach the scaled range
        config["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 64}
    return {
        "architectures": [kind.architecture], "model_type": kind.model_type, "hidden_act": "silu", "initializer_range": FULL_STD,
        "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "tie_word_embeddings": False, "torch_dtype": dtype, "use_cache": True, **config,
    }


def _write_shards(path: Path, config: ModelConfig, seed: int, dtype: torch.dtype, std: float | None) -> None:
    """Bounded memory: one shard is held at a time. A single shard gets the single-file name."""
    shard: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        file = path / f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, file))
        shard.clear()
        held = 0

    for name, shape in tensor_shapes(config):
        tensors = _stored_as(name, _random_tensor(name, shape, seed, dtype, std), is_fp8=config.fp8_block is not None)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if held and held + size > SHARD_BYTES:
            flush()
        shard.update(tensors)
        held += size
        total += size
    flush()
    if len(set(files.values())) == 1:
        next(iter(files.values())).rename(path / SINGLE)
    else:
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": {name: file.name for name, file in files.items()}})


def _random_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype, std: float | None) -> Tensor:
    """Every tensor from a seed of its own: equal tensors would route all tokens to the same experts. std None: by fan-in."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # the CPU generator takes 32 bits
    if std is None:
        std = 0.1 if len(shape) == 1 else 1.0 if "embed_tokens" in name else 1.0 / math.sqrt(shape[-1])
    kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator).to(kept)


def _stored_as(name: str, tensor: Tensor, *, is_fp8: bool) -> dict[str, Tensor]:
    """The tensor as the files hold it: of an fp8 model every projection in blocks, with the scales beside it."""
    if not is_fp8 or not name.removesuffix("_with_mqa.weight").removesuffix(".weight").endswith("_proj"):
        return {name: tensor}
    weight = quantize(tensor)
    return {name: weight.data, name + SCALE_SUFFIX: weight.scale}


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Official name and shape of every tensor of a model's checkpoint, layer by layer."""
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _attention_shapes(config, f"{layer}.self_attn")
        yield from _mlp_shapes(config, f"{layer}.mlp", index)
    yield "model.norm.weight", (hidden,)
    if not config.is_tied:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _attention_shapes(config: ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config.hidden_size, config.num_heads
    mla = config.mla
    if mla is None:
        for part, count in (("q", heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            yield f"{prefix}.{part}_proj.weight", (count * config.head_dim, hidden)
            if config.has_qkv_bias:
                yield f"{prefix}.{part}_proj.bias", (count * config.head_dim,)
        yield f"{prefix}.o_proj.weight", (hidden, heads * config.head_dim)
        return
    if mla.q_lora_rank is None:
        yield f"{prefix}.q_proj.weight", (heads * config.head_dim, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (mla.q_lora_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (mla.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (heads * config.head_dim, mla.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (mla.kv_lora_rank + mla.rope_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (mla.kv_lora_rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (mla.nope_dim + mla.v_dim), mla.kv_lora_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * mla.v_dim)


def _mlp_shapes(config: ModelConfig, prefix: str, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    moe = config.moe
    if moe is None or layer < moe.first_layer:
        yield from _gated_shapes(prefix, config.hidden_size, config.intermediate_size)
        return
    yield f"{prefix}.gate.weight", (moe.num_experts, config.hidden_size)
    if moe.routing == "noaux_tc":
        yield f"{prefix}.gate.e_score_correction_bias", (moe.num_experts,)
    for expert in range(moe.num_experts):
        yield from _gated_shapes(f"{prefix}.experts.{expert}", config.hidden_size, moe.intermediate_size)
    if moe.shared_intermediate_size:
        yield from _gated_shapes(f"{prefix}.shared_experts", config.hidden_size, moe.shared_intermediate_size)


def _gated_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
