"""Move KV pages of all layers in one launch: between two pools, or between a pool and contiguous memory.

A pool is [planes, num_slots, elements]; a page is `page_size` slots in a row, so in each plane it is one run of bytes. The bytes are
moved as 32-bit words, four to an access, and never looked at.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Config:
    block: int                  # 32-bit words that a program has in flight
    num_warps: int
    max_programs: int = 0       # at most so many at a time, to leave multiprocessors to others; 0: as many as there is work


DEFAULT = Config(block=2048, num_warps=4)
FROM_A_PEER = Config(block=2048, num_warps=4, max_programs=264)  # 2 MB under way fill NVLink; more only take the steps' multiprocessors


def copy_pages(src_pool: Tensor, dst_pool: Tensor, src_pages: Tensor, dst_pages: Tensor, page_size: int, *,
               config: Config | None = None) -> None:
    """dst_pool's page dst_pages[i] becomes src_pool's page src_pages[i], in all planes.

    src_pool, dst_pool    [planes, slots, elements], contiguous, of one type; slots may differ. May be one pool if no page that is
                          written is read
    src_pages, dst_pages  [n] int32 on the device; the caller vouches that the pages exist and dst_pages are distinct

    Raises ValueError for pools that do not fit together or pages that are not whole 32-bit words.
    """
    _launch(src_pool, dst_pool, src_pages, dst_pages, page_size, src_pages.shape[0], config)


def gather_pages(pool: Tensor, pages: Tensor, page_size: int, out: Tensor | None = None, *, config: Config | None = None) -> Tensor:
    """Pages as one contiguous tensor, for sending.

    pool     [planes, slots, elements], contiguous
    pages    [n] int32 on the device, of pages that exist
    returns  [planes, n * page_size, elements]; `out` if given

    Raises ValueError as copy_pages does.
    """
    num_pages = pages.shape[0]
    if out is None:
        out = torch.empty(pool.shape[0], num_pages * page_size, pool.shape[2], dtype=pool.dtype, device=pool.device)
    _launch(pool, out, pages, None, page_size, num_pages, config)
    return out


def scatter_pages(packed: Tensor, pool: Tensor, pages: Tensor, page_size: int, *, config: Config | None = None) -> None:
    """What gather_pages made, put into the pages of another pool.

    packed  [planes, n * page_size, elements], contiguous
    pool    [planes, slots, elements], contiguous
    pages   [n] int32 on the device, distinct, of pages that exist

    Raises ValueError as copy_pages does.
    """
    _launch(packed, pool, None, pages, page_size, pages.shape[0], config)


def copy_pages_reference(src_pool: Tensor, dst_pool: Tensor, src_pages: Tensor, dst_pages: Tensor, page_size: int) -> None:
    """As copy_pages."""
    src, dst = (torch.unflatten(pool, 1, (-1, page_size)) for pool in (src_pool, dst_pool))
    dst[:, dst_pages.long()] = src[:, src_pages.long()]


def _launch(src: Tensor, dst: Tensor, src_pages: Tensor | None, dst_pages: Tensor | None, page_size: int, num_pages: int,
            config: Config | None) -> None:
    """A side without a page list is contiguous memory: its i-th page is page i."""
    page_bytes = page_size * src.shape[2] * src.element_size()
    if src.shape[::2] != dst.shape[::2] or src.dtype != dst.dtype or src.shape[1] % page_size or dst.shape[1] % page_size \
            or page_bytes % 4 or not src.is_contiguous() or not dst.is_contiguous():
        raise ValueError(f"page copy: {tuple(src.shape)} {src.dtype} to {tuple(dst.shape)} {dst.dtype} in pages of {page_size}")
    config = config or DEFAULT
    page_words = page_bytes // 4
    num_blocks = src.shape[0] * num_pages * triton.cdiv(page_words, config.block)
    grid = min(num_blocks, config.max_programs) if config.max_programs else num_blocks
    _page_copy_kernel[(grid,)](src.view(-1).view(torch.int32), dst.view(-1).view(torch.int32), src_pages, dst_pages,
                          src.shape[1] // page_size, dst.shape[1] // page_size, num_pages, num_blocks,
                          PAGE_WORDS=page_words, BLOCK=config.block, num_warps=config.num_warps)


# Nothing about the number of pages or where their lists stand is compiled in: a hand-over never waits for a compiler.
@triton.jit(do_not_specialize=["src_num_pages", "dst_num_pages", "num_pages", "num_blocks"],
            do_not_specialize_on_alignment=["src_pages", "dst_pages"])
def _page_copy_kernel(src, dst, src_pages, dst_pages, src_num_pages, dst_num_pages, num_pages, num_blocks,
                 PAGE_WORDS: tl.constexpr, BLOCK: tl.constexpr):
    BLOCKS_PER_PAGE: tl.constexpr = (PAGE_WORDS + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    while block < num_blocks:
        words = block % BLOCKS_PER_PAGE * BLOCK + tl.arange(0, BLOCK)
        index = block // BLOCKS_PER_PAGE
        plane, page = (index // num_pages).to(tl.int64), index % num_pages
        src_page, dst_page = page, page
        if src_pages is not None:
            src_page = tl.load(src_pages + page)
        if dst_pages is not None:
            dst_page = tl.load(dst_pages + page)
        is_inside = words < PAGE_WORDS
        # Read once, and decoding beside it has better use for the L2 cache.
        data = tl.load(src + (plane * src_num_pages + src_page) * PAGE_WORDS + words, mask=is_inside, eviction_policy="evict_first")
        tl.store(dst + (plane * dst_num_pages + dst_page) * PAGE_WORDS + words, data, mask=is_inside, eviction_policy="evict_first")
        block += tl.num_programs(0)
