"""A random checkpoint of full size, drawn on the GPU and written as fast as memory takes it: files for a farm to load.

Shards are mapped and filled by several threads, so no tensor is held twice. A RAM file system is the place for it where there is room.
"""

import json
import mmap
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.device_weights import RandomWeights
from workers.loader import INDEX, Stored
from workers.model_config import ModelConfig
from workers.random_tokenizer import BOS_ID, EOS_ID, write_tokenizer

SHARD_BYTES = 2 << 30
NUM_THREADS = 12
RAM_DISK, DISK = Path("/dev/shm"), Path("/tmp")
SPARE_BYTES = 4 << 30
HEADER_STEP = 64         # a header is padded with spaces: tensors begin aligned


def roomiest(num_bytes: int) -> Path:
    """The RAM disk if it has room, else the disk."""
    is_there = RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > num_bytes + SPARE_BYTES
    return RAM_DISK if is_there else DISK


def write_checkpoint(path: Path, raw: dict[str, Any], device: torch.device, seed: int = 0) -> int:
    """Write config.json, tokenizer and weights of the model that `raw`, a config.json, describes. Returns the weights' bytes."""
    config = ModelConfig.parse(raw)
    weights = RandomWeights(config, getattr(torch, config.dtype), device, seed)
    path.mkdir(parents=True, exist_ok=True)
    shards = _shards(weights.tensors())
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(lambda name, shard: _write_shard(path / name, shard, weights), names, shards))
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    _write_json(path / INDEX, {"metadata": {"total_size": weights.num_bytes}, "weight_map": weight_map})
    _write_json(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    write_tokenizer(path, config.vocab_size, config.max_position)
    _write_json(path / "config.json", raw)  # last: a folder with it is a whole checkpoint
    return weights.num_bytes


def _shards(tensors: dict[str, Stored]) -> list[dict[str, Stored]]:
    shards: list[dict[str, Stored]] = [{}]
    held = 0
    for name, stored in tensors.items():
        if held and held + stored.num_bytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = stored
        held += stored.num_bytes
    return shards


def _write_shard(path: Path, shard: dict[str, Stored], weights: RandomWeights) -> None:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in shard.items():
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [end, end + stored.num_bytes]}
        end += stored.num_bytes
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % HEADER_STEP)
    start = 8 + len(header)
    with path.open("w+b") as file:
        file.truncate(start + end)
        with mmap.mmap(file.fileno(), start + end) as memory:
            memory[:start] = len(header).to_bytes(8, "little") + header
            for name in shard:
                begin, stop = entries[name]["data_offsets"]
                tensor = weights.draw(name).contiguous().view(torch.uint8).flatten()
                view = torch.frombuffer(memory, dtype=torch.uint8, count=stop - begin, offset=start + begin)
                view.copy_(tensor)
                del view  # the file cannot be unmapped under it


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
