"""Turn a llama-architecture GGUF file into a Hugging Face folder: config, tokenizer and dequantized safetensors.

Knows llama.cpp's conventions (key names, tensor names, the row order of Q and K, the `smollm` pre-tokenizer) and nothing of where the file
comes from. Only what the demo model needs is taken: an unknown architecture, tokenizer or tensor is refused, never guessed at.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from coordinator.errors import TokenmillError

OnTensor = Callable[[int, int], None]
CONTROL_TOKEN = 3  # llama.cpp's token type for tokens that are never text
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class UnsupportedGGUF(TokenmillError):
    """The GGUF file holds something that this converter does not know."""


def convert_gguf(gguf_path: Path, dest: Path, *, dtype: str = "fp32", on_tensor: OnTensor = lambda done, total: None) -> None:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors for `gguf_path` into the folder `dest`.

    dtype      "fp32" (exactly what the quantized file means) or "bf16"
    on_tensor  called as (tensors done, tensors in all) for progress

    Raises UnsupportedGGUF if it is not a llama model with a byte-level BPE tokenizer of the `smollm` kind.
    """
    from gguf import GGUFReader  # an optional dependency: the extra `demo`

    reader = GGUFReader(str(gguf_path))
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, dtype, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    _write_json(dest / "config.json", config)
    _write_json(dest / "generation_config.json", _generation_config(fields))
    _tokenizer(fields).save(str(dest / "tokenizer.json"))
    _write_json(dest / "tokenizer_config.json", _tokenizer_config(fields))
    weights = dest / "model.safetensors"
    save_file(_tensors(reader, config, DTYPES[dtype], on_tensor), weights, metadata={"format": "pt"})
    weights.chmod((dest / "config.json").stat().st_mode)  # safetensors makes it private to this user, whatever the umask says


def _config(fields: dict[str, Any], dtype: str, tied: bool) -> dict[str, Any]:
    if fields.get("general.architecture") != "llama":
        raise UnsupportedGGUF(f"architecture {fields.get('general.architecture')!r} is not llama")
    num_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": fields.get("llama.rope.dimension_count", fields["llama.embedding_length"] // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
    }


def _shortest(value: float) -> float:
    """GGUF keeps numbers as float32: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Both ends end an answer: the chat template's <|im_end|> and the base model's <|endoftext|>."""
    tokens = fields["tokenizer.ggml.tokens"]
    eos = fields["tokenizer.ggml.eos_token_id"]
    ends = [eos] + [i for i, token in enumerate(tokens[:64]) if token == "<|endoftext|>" and i != eos]
    bos, pad = fields["tokenizer.ggml.bos_token_id"], fields.get("tokenizer.ggml.padding_token_id")
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad}


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE. llama.cpp's `smollm` pre-tokenizer cuts out each digit first, then splits as GPT-2 does."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise UnsupportedGGUF(f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not known, only 'gpt2' with 'smollm'")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    named = {
        "bos_token": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token": fields.get("tokenizer.ggml.padding_token_id"),
        "unk_token": fields.get("tokenizer.ggml.unknown_token_id"),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[index] for name, index in named.items() if index is not None},
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields.get("tokenizer.chat_template"),
    }


def _tensors(reader: Any, config: dict[str, Any], dtype: torch.dtype, on_tensor: OnTensor) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    state: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        name = _hf_name(tensor.name)
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        for projection, num_heads in heads.items():
            if name.endswith(f"{projection}.weight"):
                weight = _undo_row_permutation(weight, num_heads)
        state[name] = weight.to(dtype).contiguous()
        on_tensor(done, len(reader.tensors))
    return state


def _undo_row_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two rotary halves of each head; Hugging Face keeps them one after the other.

    weight  [num_heads * head_dim, hidden], rows within a head as (0, d/2, 1, d/2 + 1, …)
    returns the same rows as (0, 1, …, d - 1)
    """
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`. Raises UnsupportedGGUF for a name that no Llama has."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{_LAYER_TENSORS[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in _MODEL_TENSORS and parts[1] == "weight":
        return f"{_MODEL_TENSORS[parts[0]]}.weight"
    raise UnsupportedGGUF(f"tensor {name!r} is not part of a Llama model")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
