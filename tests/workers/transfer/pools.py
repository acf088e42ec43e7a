"""Pools whose every element says where it belongs, for one rank of a group: what arrives can be checked without the source."""

import os

import torch
from torch import Tensor

from coordinator.messages import KVLayout
from workers.kv_cache import KVCache
from workers.transfer.plan import heads_of

PAGE_SIZE = 4
KINDS = ("mla", "gqa")
NUM_HEADS = {"mla": 1, "gqa": 8}
WIDTH = 16
NUM_LAYERS = 3


def make_pool(kind: str, num_pages: int, tp_size: int = 1, rank: int = 0, device: str = "cpu", *, width: int = WIDTH,
              dtype: torch.dtype = torch.float32, is_filled: bool = True, salt: int = 0) -> KVCache:
    num_heads = len(heads_of(NUM_HEADS[kind], tp_size, rank))
    pool = KVCache.create(_Shape(kind, num_heads, width), num_pages, PAGE_SIZE, dtype, torch.device(device),  # type: ignore[arg-type]
                          tp_size=tp_size, whole=_Shape(kind, NUM_HEADS[kind], width))  # type: ignore[arg-type]
    if is_filled:
        fill(pool, kind, tp_size, rank, salt)
    return pool


class _Shape:
    """As much of a model's config as a pool wants to know."""

    def __init__(self, kind: str, num_heads: int, width: int) -> None:
        self.mla = kind == "mla" or None
        self.kv_kind = kind
        self.num_layers = NUM_LAYERS
        self.num_kv_heads = num_heads
        self.head_dim = width
        self.kv_row = width if self.mla else 2 * num_heads * width


def fill(pool: KVCache, kind: str, tp_size: int, rank: int, salt: int = 0) -> None:
    """Every page with what `cells` says."""
    pool.flat.copy_(cells(kind, list(range(pool.num_pages)), tp_size, rank, pool.head_width, salt).to(pool.flat.dtype))


def cells(kind: str, pages: list[int], tp_size: int, rank: int, width: int, salt: int = 0) -> Tensor:
    """[planes, slots of these pages, elements]: small whole numbers, different for neighbours of every kind."""
    planes = torch.arange(NUM_LAYERS if kind == "mla" else 2 * NUM_LAYERS).view(-1, 1, 1, 1)
    slots = (torch.tensor(pages).unsqueeze(1) * PAGE_SIZE + torch.arange(PAGE_SIZE)).view(1, -1, 1, 1)
    heads = torch.tensor(list(heads_of(NUM_HEADS[kind], tp_size, rank))).view(1, 1, -1, 1)
    values = (planes * 31 + slots * 7 + heads * 53 + torch.arange(width) * 3 + salt * 101) % 251 + 1
    return values.flatten(2)


def read(pool: KVCache, pages: list[int]) -> Tensor:
    return pool.flat.cpu().unflatten(1, (-1, PAGE_SIZE))[:, pages].flatten(1, 2).long()


def layout_of(kind: str, tp_size: int = 1, width: int = WIDTH) -> KVLayout:
    row = width if kind == "mla" else 2 * NUM_HEADS[kind] * width
    return KVLayout(model="", weights="", kind=kind, num_layers=NUM_LAYERS, row=row, dtype="float32", page_size=PAGE_SIZE, tp_size=tp_size,
                    num_kv_heads=NUM_HEADS[kind])


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
