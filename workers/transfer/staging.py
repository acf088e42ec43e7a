"""Pages as contiguous memory and back, in chunks of a bounded size: what goes over a wire. Knows pools, no wires."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from workers.kv_cache import KVCache

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 16 << 20, 64 << 20


def pages_per_chunk(pool: KVCache, num_heads: int) -> int:
    """Both sides of a transfer cut its pages into chunks of so many."""
    planes, chunk_bytes = pool.flat.shape[0], GPU_CHUNK_BYTES if pool.flat.is_cuda else CPU_CHUNK_BYTES
    return max(1, chunk_bytes // (planes * pool.page_size * num_heads * pool.head_width * pool.flat.itemsize))


def chunks(pages: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(pages), size):
        yield pages[first : first + size]


def empty(pool: KVCache, num_pages: int, num_heads: int, device: torch.device) -> Tensor:
    """Memory for so many pages. On a CPU that serves a GPU it is pinned."""
    is_pinned = device.type == "cpu" and pool.flat.is_cuda
    return torch.empty(pool.flat.shape[0], num_pages * pool.page_size, num_heads * pool.head_width, dtype=pool.flat.dtype, device=device,
                       pin_memory=is_pinned)


def pack(pool: KVCache, pages: Sequence[int], first_head: int, num_heads: int) -> Tensor:
    """[planes, pages * page_size, columns of these heads], on the pool's device; on a GPU on the current stream."""
    columns = pool.columns(first_head, num_heads)
    if pool.flat.is_cuda and columns == pool.columns(0, None):
        from kernels.page_copy import gather_pages  # Triton, which only a GPU needs

        return gather_pages(pool.flat, _device_pages(pool, pages), pool.page_size)
    by_page = pool.flat.unflatten(1, (-1, pool.page_size))[..., columns]
    packed: Tensor = by_page.index_select(1, _device_pages(pool, pages)).flatten(1, 2)
    return packed


def unpack(packed: Tensor, pool: KVCache, pages: Sequence[int], first_head: int, num_heads: int) -> None:
    """What `pack` made, on the pool's device, into these pages."""
    columns = pool.columns(first_head, num_heads)
    if pool.flat.is_cuda and columns == pool.columns(0, None):
        from kernels.page_copy import scatter_pages

        scatter_pages(packed, pool.flat, _device_pages(pool, pages), pool.page_size)
        return
    by_page = pool.flat.unflatten(1, (-1, pool.page_size))[..., columns]
    by_page.index_copy_(1, _device_pages(pool, pages).long(), packed.unflatten(1, (-1, pool.page_size)))


def warm_up(pool: KVCache) -> None:
    """Compile what a transfer launches. Page 0 becomes what it is."""
    unpack(pack(pool, [0], 0, pool.num_heads), pool, [0], 0, pool.num_heads)


def _device_pages(pool: KVCache, pages: Sequence[int]) -> Tensor:
    if not pool.flat.is_cuda:
        return torch.tensor(pages, dtype=torch.int64)
    return torch.from_numpy(np.asarray(pages, dtype=np.int32)).pin_memory().to(pool.device, non_blocking=True)
