"""The published models' shapes that are measured, as config.json has them."""

from typing import Any

from workers.random_model import FULL_STD, KINDS
from workers.random_tokenizer import BOS_ID, EOS_ID

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SMALL_VOCAB = 4096  # of a model of a few layers: its output projection must not be what is measured


def full_config(kind: str, **changes: Any) -> dict[str, Any]:
    """`kind` is one of `workers.random_model.KINDS`, at its full size but for `changes`."""
    known = KINDS[kind]
    common = {"architectures": [known.architecture], "model_type": known.model_type, "hidden_act": "silu", "initializer_range": FULL_STD,
              "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True}
    return {**common, **known.full, **changes}


def named_config(name: str) -> dict[str, Any]:
    """`v2-lite`, or `v3-layers:N` for N layers with experts of DeepSeek-V3 in FP8. Raises ValueError for another name."""
    kind, _, layers = name.partition(":")
    if name == "v2-lite":
        return full_config("deepseek-v2-lite")
    if kind == "v3-layers" and layers.isdigit() and int(layers) > 0:
        return full_config("deepseek-v3", num_hidden_layers=int(layers), first_k_dense_replace=0, vocab_size=SMALL_VOCAB,
                           quantization_config=FP8)
    raise ValueError(f"model {name}: must be v2-lite or v3-layers:N")
