"""What a Hugging Face config.json says about a model, checked and in one shape. Knows no tensor.

Everything that changes the numbers is either understood here or refused with the key's name (ConfigError): a model is never run
"nearly right".
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.errors import ConfigError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `dim` rotated dimensions; the fields after `factor` belong to the kinds "llama3" and "yarn"."""

    dim: int
    theta: float
    kind: str                                # "default", "linear", "llama3" or "yarn"
    interleaved: bool = False                # pairs are (0, 1), (2, 3), …; otherwise (0, dim/2), (1, dim/2 + 1), …
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention: the cache holds `kv_lora_rank + rope_dim` numbers per token and layer, for all heads."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Routed experts from layer `first_layer` on. `routing` is "greedy", "group_limited_greedy" or "noaux_tc"."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int            # 0: no shared expert
    first_layer: int
    routing: str
    num_groups: int
    num_groups_per_token: int
    normalize_weights: bool
    scaling_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. `kv_row` is what the cache holds per token and layer (keys and values together, or the latent)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    is_tied: bool                            # the output projection is the embedding table
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    dtype: str                               # of the checkpoint: one of DTYPES
    bos_id: int | None
    eos_ids: tuple[int, ...]
    rope: RopeConfig
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    fp8_block: tuple[int, int] | None = None  # weights are e4m3 with one scale per block of this shape

    @property
    def kv_kind(self) -> str:
        return "mla" if self.mla else "gqa"

    @property
    def kv_row(self) -> int:
        return self.mla.kv_lora_rank + self.mla.rope_dim if self.mla else 2 * self.num_kv_heads * self.head_dim

    @classmethod
    def from_dir(cls, model_dir: Path) -> "ModelConfig":
        """Read config.json and, for the end-of-sequence ids, generation_config.json. Raises ConfigError."""
        config = _read_json(model_dir / "config.json")
        generation_file = model_dir / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return cls.parse(config, generation)

    @classmethod
    def parse(cls, config: dict[str, Any], generation: dict[str, Any] | None = None) -> "ModelConfig":
        """`config` as in config.json, `generation` as in generation_config.json. Raises ConfigError naming the first bad key."""
        architectures = config.get("architectures") or []
        if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
            raise ConfigError(f"config.json: architectures is {architectures!r}; supported are {', '.join(ARCHITECTURES)}")
        architecture = str(architectures[0])
        read = _Reader(config)
        read.must_be("hidden_act", ("silu",), default="silu")
        is_deepseek = architecture.startswith("Deepseek")
        mla = _mla(read) if is_deepseek else None
        num_heads = read.count("num_attention_heads")
        attention_bias = read.flag("attention_bias")
        hidden_size = read.count("hidden_size")
        head_dim = mla.nope_dim + mla.rope_dim if mla else read.count("head_dim", default=hidden_size // num_heads)
        max_position = read.count("max_position_embeddings", default=2048)
        num_kv_heads = num_heads if mla else read.count("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        _refuse_sliding_window(read)
        generation = generation or {}
        eos = generation.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.count("intermediate_size"),
            num_layers=read.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=read.number("rms_norm_eps", default=1e-6),
            max_position=max_position,
            is_tied=read.flag("tie_word_embeddings"),
            has_qkv_bias=True if architecture == "Qwen2ForCausalLM" else attention_bias,
            has_o_bias=attention_bias and architecture != "Qwen2ForCausalLM",
            has_mlp_bias=read.flag("mlp_bias") and architecture == "LlamaForCausalLM",
            dtype=_dtype(config),
            bos_id=config.get("bos_token_id") if isinstance(config.get("bos_token_id"), int) else None,
            eos_ids=_token_ids("eos_token_id", config.get("eos_token_id") if eos is None else eos),
            rope=_rope(read, mla.rope_dim if mla else head_dim, max_position, is_interleaved=_is_interleaved(read, architecture)),
            mla=mla,
            moe=_moe(read, architecture) if is_deepseek else None,
            fp8_block=_fp8_block(config.get("quantization_config")),
        )


class _Reader:
    """Typed access to a JSON map; every failure names the key. JSON null counts as absent."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def count(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{self.where}: {key} must be an integer of at least {least}, got {value!r}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} must be a number, got {value!r}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} must be true or false, got {value!r}")
        return value

    def must_be(self, key: str, allowed: tuple[Any, ...], *, default: Any) -> Any:
        value = self._get(key, default)
        if value not in allowed:
            raise ConfigError(f"{self.where}: {key} is {value!r}; supported: {', '.join(repr(a) for a in allowed)}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is --model_dir a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value


def _dtype(config: dict[str, Any]) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"config.json: torch_dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    return dtype


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"config.json: {key} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _refuse_sliding_window(read: _Reader) -> None:
    layer_types = read.values.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"config.json: layer_types {sorted(set(layer_types))} are not supported, only full_attention")
    if read.values.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window is not supported")


def _is_interleaved(read: _Reader, architecture: str) -> bool:
    if architecture == "DeepseekV3ForCausalLM":
        return read.flag("rope_interleave", default=True)
    return architecture == "DeepseekV2ForCausalLM"


def _rope(read: _Reader, dim: int, max_position: int, *, is_interleaved: bool) -> RopeConfig:
    """Both spellings: `rope_parameters` with everything in it, and `rope_theta` beside `rope_scaling`."""
    given = read.values.get("rope_parameters") or read.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"config.json: rope_scaling must be an object, got {given!r}")
    scaling = _Reader({"type": given.get("rope_type"), **given}, "config.json rope_scaling")
    theta = scaling.number("rope_theta", default=read.number("rope_theta", default=10000.0))
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"config.json: rope type {kind!r} is not supported, only default, linear, llama3 and yarn")
    for reader in (read, scaling):
        reader.must_be("partial_rotary_factor", (1, 1.0), default=1.0)
    if kind == "default":
        return RopeConfig(dim=dim, theta=theta, kind=kind, interleaved=is_interleaved)
    # An outer original_max_position_embeddings wins over the inner one, as transformers has it.
    inner = scaling.count("original_max_position_embeddings", default=max_position)
    original = read.count("original_max_position_embeddings", default=inner)
    factor = scaling.number("factor", default=max_position / original if kind == "yarn" else None)
    attention_factor = given.get("attention_factor")
    return RopeConfig(
        dim=dim,
        theta=theta,
        kind=kind,
        interleaved=is_interleaved,
        factor=factor,
        original_max_position=original,
        low_freq_factor=scaling.number("low_freq_factor", default=None if kind == "llama3" else 1.0),
        high_freq_factor=scaling.number("high_freq_factor", default=None if kind == "llama3" else 4.0),
        beta_fast=scaling.number("beta_fast", default=32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", default=1.0) or 1.0,
        mscale=scaling.number("mscale", default=0.0),
        mscale_all_dim=scaling.number("mscale_all_dim", default=0.0),
        attention_factor=None if attention_factor is None else scaling.number("attention_factor"),
        truncate=scaling.flag("truncate", default=True),
    )


def _mla(read: _Reader) -> MlaConfig:
    return MlaConfig(
        q_lora_rank=None if read.values.get("q_lora_rank") is None else read.count("q_lora_rank"),
        kv_lora_rank=read.count("kv_lora_rank"),
        nope_dim=read.count("qk_nope_head_dim"),
        rope_dim=read.count("qk_rope_head_dim"),
        v_dim=read.count("v_head_dim"),
    )


def _moe(read: _Reader, architecture: str) -> MoeConfig:
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    read.must_be("moe_layer_freq", (1,), default=1)
    read.must_be("scoring_func", ("sigmoid",) if is_v3 else ("softmax",), default="sigmoid" if is_v3 else "softmax")
    if is_v3:
        routing = str(read.must_be("topk_method", ("noaux_tc",), default="noaux_tc"))
    else:
        routing = str(read.must_be("topk_method", ("greedy", "group_limited_greedy"), default="greedy"))
        read.must_be("norm_topk_prob", (False,), default=False)
    num_experts = read.count("n_routed_experts")
    top_k = read.count("num_experts_per_tok")
    is_grouped = routing != "greedy"
    num_groups = read.count("n_group", default=8 if is_v3 else None) if is_grouped else 1
    groups_per_token = read.count("topk_group", default=4 if is_v3 else None) if is_grouped else 1
    if num_experts % num_groups:
        raise ConfigError(f"config.json: n_routed_experts {num_experts} is not a multiple of n_group {num_groups}")
    if groups_per_token > num_groups or top_k > num_experts // num_groups * groups_per_token:
        raise ConfigError(f"config.json: num_experts_per_tok {top_k} does not fit topk_group {groups_per_token} of n_group {num_groups}")
    if is_v3 and num_experts // num_groups < 2:
        raise ConfigError(f"config.json: n_group {num_groups} leaves less than two of {num_experts} experts in a group")
    intermediate = read.count("moe_intermediate_size")
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=top_k,
        intermediate_size=intermediate,
        shared_intermediate_size=intermediate * read.count("n_shared_experts", default=0, least=0),
        first_layer=read.count("first_k_dense_replace", default=3 if is_v3 else 0, least=0),
        routing=routing,
        num_groups=num_groups,
        num_groups_per_token=groups_per_token,
        normalize_weights=is_v3 and read.flag("norm_topk_prob", default=True),
        scaling_factor=read.number("routed_scaling_factor", default=2.5 if is_v3 else 1.0),
    )


def _fp8_block(quantization: Any) -> tuple[int, int] | None:
    if quantization is None:
        return None
    read = _Reader(quantization if isinstance(quantization, dict) else {}, "config.json quantization_config")
    read.must_be("quant_method", ("fp8",), default="")
    block = read.values.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise ConfigError(f"config.json quantization_config: weight_block_size must be two integers, got {block!r}")
    return block[0], block[1]
