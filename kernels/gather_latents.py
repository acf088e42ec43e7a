"""Bring the paged latents of whole sequences together in rows, for the product that decompresses them."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def gather_latents(cache: Tensor, page_table: Tensor, cu_k: Tensor, num_keys: int, max_k: int, page_size: int) -> Tensor:
    """
    cache       [num_slots, R + rope], contiguous
    page_table  [B, max_pages] int32
    cu_k        [B + 1] int32: sequence b fills rows cu_k[b] to cu_k[b + 1]
    num_keys    cu_k[B], max_k the most of one sequence: known to the host
    returns     [num_keys, R + rope]
    """
    width = cache.shape[1]
    out = torch.empty(num_keys, width, dtype=cache.dtype, device=cache.device)
    rows = min(page_size, 16)
    grid = (triton.cdiv(max_k, rows), page_table.shape[0])
    _gather_kernel[grid](cache, page_table, cu_k, out, page_table.stride(0), PAGE_SIZE=page_size, ROWS=rows, WIDTH=width,
                         BLOCK=triton.next_power_of_2(width), num_warps=4)
    return out


@triton.jit
def _gather_kernel(cache, page_table, cu_k, out, table_stride, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK: tl.constexpr):
    seq = tl.program_id(1)
    start, end = tl.load(cu_k + seq), tl.load(cu_k + seq + 1)
    first = tl.program_id(0) * ROWS
    if first < end - start:
        page = tl.load(page_table + seq.to(tl.int64) * table_stride + first // PAGE_SIZE).to(tl.int64)
        row = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        is_inside = (first + row < end - start) & (column < WIDTH)
        source = cache + (page * PAGE_SIZE + first % PAGE_SIZE + row) * WIDTH + column
        dest = out + (start + first + row).to(tl.int64) * WIDTH + column
        tl.store(dest, tl.load(source, mask=is_inside), mask=is_inside)
