"""Sort the rows of a mixture of experts by expert, each expert starting at a whole block: what the grouped products run over.

A row is one (token, choice) pair, position t * k + j. Knows expert ids and positions; neither scores nor weights.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096        # positions that one program sorts at a time
MAX_CHUNKS = 16    # programs that share one expert's positions when there are many
MIN_BINS = 64


@dataclass(frozen=True, slots=True)
class Aligned:
    """Rows in the order of their experts. In sorted_rows stand, block after block of `block_m` slots:

        blocks of expert 0 | of expert 1 | … | of padding (ids of -1) | unused

    sorted_rows    [num_blocks * block_m] int32, rows of an expert in ascending order; a slot without a row holds the number of rows
    block_experts  [num_blocks + 1] int32, -1 for padding and unused blocks; at the end the number of blocks that hold rows
    num_blocks     known without the ids: what a grid is made from
    """

    sorted_rows: Tensor
    block_experts: Tensor
    block_m: int
    num_blocks: int


def align(ids: Tensor, num_experts: int, block_m: int) -> Aligned:
    """Sort by expert, stable: the same ids give the same order, without a word to the host.

    ids  [T, k] int32, contiguous, below num_experts; -1 marks padding

    Raises ValueError if ids are not contiguous int32. Source: vLLM's moe_align_block_size, with a counting sort by expert and chunk
    of positions in place of atomics.
    """
    aligned = allocate(ids.numel(), num_experts, block_m, ids.device)
    align_into(aligned, ids, num_experts)
    return aligned


def align_into(aligned: Aligned, ids: Tensor, num_experts: int) -> None:
    """`align` into what `allocate` made for as many rows and experts."""
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous int32, not {ids.dtype} with strides {ids.stride()}")
    num_rows = ids.numel()
    if not num_rows:
        aligned.block_experts.zero_()
        return
    tile = min(max(triton.next_power_of_2(num_rows), 32), TILE)
    chunk_tiles = triton.next_power_of_2(triton.cdiv(num_rows, MAX_CHUNKS * tile))
    num_chunks = triton.cdiv(num_rows, chunk_tiles * tile)
    num_bins = max(triton.next_power_of_2(num_experts + 1), MIN_BINS)
    num_warps = 8 if tile > 1024 else 4
    grid = (num_experts + 1, num_chunks)
    counts = aligned.block_experts   # not read where one chunk holds all rows
    if num_chunks > 1:
        counts = torch.empty(num_chunks * num_bins, dtype=torch.int32, device=ids.device)
        _count[grid](ids, counts, num_rows, NUM_EXPERTS=num_experts, BINS=num_bins, TILE=tile, CHUNK_TILES=chunk_tiles, num_warps=num_warps)
    _place[grid](ids, counts, aligned.sorted_rows, aligned.block_experts, num_rows, aligned.num_blocks, NUM_EXPERTS=num_experts,
                 BINS=num_bins, TILE=tile, CHUNK_TILES=chunk_tiles, CHUNKS=triton.next_power_of_2(num_chunks),
                 BLOCK_M=aligned.block_m, num_warps=num_warps)


def allocate(num_rows: int, num_experts: int, block_m: int, device: torch.device) -> Aligned:
    """Room for the order of any ids: every expert that can occur, and the padding, wastes up to block_m - 1 slots."""
    num_segments = min(num_rows, num_experts + 1)
    num_blocks = (num_rows + num_segments * (block_m - 1)) // block_m
    sorted_rows, block_experts = torch.empty(num_blocks * (block_m + 1) + 1, dtype=torch.int32, device=device).split(
        (num_blocks * block_m, num_blocks + 1))
    return Aligned(sorted_rows, block_experts, block_m, num_blocks)


def align_reference(ids: Tensor, num_experts: int, block_m: int) -> tuple[list[int], list[int]]:
    """sorted_rows and block_experts as lists, without the unused blocks."""
    flat = ids.flatten().tolist()
    sorted_rows: list[int] = []
    block_experts: list[int] = []
    for expert in [*range(num_experts), -1]:
        rows = [position for position, chosen in enumerate(flat) if chosen == expert]
        num_blocks = -(-len(rows) // block_m)
        sorted_rows += rows + [len(flat)] * (num_blocks * block_m - len(rows))
        block_experts += [expert] * num_blocks
    return sorted_rows, block_experts


@triton.jit
def _segments(ids, start, end, NUM_EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """Positions [TILE] from `start` on and the segment of each: its expert, NUM_EXPERTS for padding, -1 from `end` on."""
    positions = start + tl.arange(0, TILE)
    ids = tl.load(ids + positions, mask=positions < end, other=0)
    return positions, tl.where(positions < end, tl.where(ids < 0, NUM_EXPERTS, ids), -1)


@triton.jit(do_not_specialize=["num_rows"])
def _count(ids, counts, num_rows, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, CHUNK_TILES: tl.constexpr):
    segment = tl.program_id(0)
    chunk = tl.program_id(1)
    hits = tl.zeros([TILE], tl.int32)
    for tile in range(CHUNK_TILES):
        _, segments = _segments(ids, (chunk * CHUNK_TILES + tile) * TILE, num_rows, NUM_EXPERTS, TILE)
        hits += (segments == segment).to(tl.int32)
    tl.store(counts + chunk * BINS + segment, tl.sum(hits))


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _place(ids, counts, sorted_rows, block_experts, num_rows, num_blocks, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr,
           TILE: tl.constexpr, CHUNK_TILES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr):
    segment = tl.program_id(0)
    chunk = tl.program_id(1)
    bins = tl.arange(0, BINS)
    num_earlier = 0   # rows of this segment in the chunks before this one
    if CHUNKS == 1:
        _, segments = _segments(ids, 0, num_rows, NUM_EXPERTS, TILE)
        totals = tl.histogram(segments, BINS, mask=segments >= 0)
    else:
        chunks = tl.arange(0, CHUNKS)[:, None]
        known = (chunks < tl.num_programs(1)) & (bins[None, :] <= NUM_EXPERTS)
        by_chunk = tl.load(counts + chunks * BINS + bins[None, :], mask=known, other=0)
        totals = tl.sum(by_chunk, 0)
        num_earlier = tl.sum(tl.where((chunks < chunk) & (bins[None, :] == segment), by_chunk, 0))
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(bins < segment, blocks, 0))
    slot = first_block * BLOCK_M + num_earlier
    for tile in range(CHUNK_TILES):
        positions, segments = _segments(ids, (chunk * CHUNK_TILES + tile) * TILE, num_rows, NUM_EXPERTS, TILE)
        hits = (segments == segment).to(tl.int32)
        tl.store(sorted_rows + slot + tl.cumsum(hits) - hits, positions, mask=hits == 1)
        slot += tl.sum(hits)
    if chunk == 0:
        num_own = tl.sum(tl.where(bins == segment, totals, 0))
        end_block = first_block + tl.sum(tl.where(bins == segment, blocks, 0))
        expert = segment
        if segment == NUM_EXPERTS:   # padding: its blocks and all after them belong to no expert
            expert = -1
            tl.store(block_experts + num_blocks, end_block)
            end_block = num_blocks
        block = first_block
        while block < end_block:
            tl.store(block_experts + block + bins, expert, mask=block + bins < end_block)
            block += BINS
        slot = first_block * BLOCK_M + num_own
        fill = tl.arange(0, TILE)
        while slot < end_block * BLOCK_M:
            tl.store(sorted_rows + slot + fill, num_rows, mask=slot + fill < end_block * BLOCK_M)
            slot += TILE
