"""What a checkpoint folder holds, read from config.json and the heads of its safetensors files; no weight is loaded."""

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from coordinator.errors import ConfigError
from workers.model_config import ModelConfig

KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_SUFFIX = "_scale_inv"  # of FP8 block scales: not parameters of the model
MAX_HEADER_BYTES = 100_000_000  # as the safetensors format has it


def checkpoint_facts(model_dir: Path) -> dict[str, str]:
    """Name → value, for reading. Raises ConfigError if it is no model folder that we can serve."""
    config = ModelConfig.from_dir(model_dir)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{model_dir} holds no *.safetensors file")
    parameters: Counter[str] = Counter()
    for path in files:
        for name, tensor in _header(path).items():
            if not name.endswith(SCALE_SUFFIX):
                parameters[str(tensor["dtype"])] += prod(tensor["shape"])
    facts = {
        "architecture": config.architecture,
        "layers": str(config.num_layers),
        "hidden size": str(config.hidden_size),
        "heads": f"{config.num_heads}" if config.mla else f"{config.num_heads}, {config.num_kv_heads} for keys and values",
        "vocabulary": f"{config.vocab_size:,}",
        "longest sequence": f"{config.max_position:,} tokens",
        "parameters": f"{sum(parameters.values()):,}",
        "stored as": ", ".join(f"{name} ({count:,})" for name, count in parameters.most_common()),
        "files": f"{len(files)}, {sum(path.stat().st_size for path in files) / 1e9:.2f} GB",
    }
    if config.moe:
        facts["experts"] = f"{config.moe.num_experts}, {config.moe.num_experts_per_token} per token, from layer {config.moe.first_layer} on"
    numbers = config.num_layers * config.kv_row
    dtypes = dict.fromkeys((config.dtype, "float32"))  # a GPU keeps the checkpoint's own, a CPU computes in fp32
    facts["KV cache"] = f"{config.kv_kind}, " + ", ".join(f"{numbers * KV_BYTES[name]:,} bytes per token in {name}" for name in dtypes)
    return facts


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → {dtype, shape, …} of each tensor. Raises ConfigError on a file that is not safetensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(text)
    except ValueError:
        raise ConfigError(f"{path} is not a safetensors file") from None
    header.pop("__metadata__", None)
    return header  # type: ignore[no-any-return]
