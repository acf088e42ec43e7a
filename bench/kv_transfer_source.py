"""The giving side of bench/kv_transfer.py: a pool of a model's shape full of known noise, on one device, until its input ends."""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from bench.shapes import named_config
from coordinator.messages import KVRank
from workers.kv_cache import KVCache
from workers.model_config import ModelConfig
from workers.transfer.desk import Desk

PAGE_SIZE = 64


def make_pool(device: torch.device, num_pages: int, model: str = "v2-lite") -> KVCache:
    return KVCache.create(ModelConfig.parse(named_config(model)), num_pages, PAGE_SIZE, torch.bfloat16, device)


def fill_with_noise(pool: KVCache, seed: int = 1) -> None:
    """The same on every device of a kind."""
    draw = torch.Generator(pool.device).manual_seed(seed)
    for plane in pool.flat:
        plane.copy_(torch.randint(-99, 100, plane.shape, generator=draw, device=pool.device, dtype=torch.int16))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_transfer_source", allow_abbrev=False)
    parser.add_argument("--device", required=True)
    parser.add_argument("--num_pages", type=int, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    pool = make_pool(device, arguments.num_pages)
    fill_with_noise(pool)
    desk = Desk(pool, "127.0.0.1")
    print(json.dumps(asdict(KVRank(address=pool.address, desk=desk.address))), flush=True)
    sys.stdin.read()
    desk.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
