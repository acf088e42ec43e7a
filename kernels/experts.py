"""The experts of a mixture: two grouped products over rows that `kernels.align` sorted, SwiGLU and routing weight in their epilogues.

Knows nothing of how experts were chosen. Shared experts are further experts that every token has in its list.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.align import Aligned, align
from kernels.launch import IS_INTERPRETED, OVERLAPS, dot_dtype, num_programs, wait_for_earlier

INTERPRETED = tl.constexpr(IS_INTERPRETED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one of the two products is cut up.

    group_m        blocks of rows that share a sweep over the weights: more reuse of both in the L2 cache
    is_swapped     weights on the side of the matrix unit that holds 64 rows: for blocks of 16 or 32 rows
    uses_tma       weights (and the second product's rows) by the bulk copy engine
    is_persistent  one program per multiprocessor, whose next tile loads while it writes the last one
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 1
    is_swapped: bool = False
    uses_tma: bool = False
    is_persistent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """prefetches: the second product's programs, which start as the first one's end, fetch their first weights into the L2 cache."""

    block_m: int
    gate_up: Tile
    down: Tile
    prefetches: bool = False


def _both(block_m: int, tile: Tile, *, prefetches: bool = False) -> Config:
    return Config(block_m=block_m, gate_up=tile, down=tile, prefetches=prefetches)


NARROW = Tile(block_n=64, block_k=128, num_warps=4, num_stages=5)
SWAPPED = Tile(block_n=64, block_k=128, num_warps=4, num_stages=5, is_swapped=True, uses_tma=True)
WIDE = Tile(block_n=128, block_k=128, num_warps=4, num_stages=4)
WIDE_SWAPPED = Tile(block_n=128, block_k=128, num_warps=4, num_stages=4, is_swapped=True, uses_tma=True)
MIDDLE = Tile(block_n=128, block_k=64, num_warps=4, num_stages=4, uses_tma=True)
TALL = Tile(block_n=256, block_k=64, num_warps=8, num_stages=4, uses_tma=True)
SLIM = Tile(block_n=256, block_k=64, num_warps=4, num_stages=3, uses_tma=True)
LARGE = Tile(block_n=256, block_k=64, num_warps=8, num_stages=4, group_m=8, uses_tma=True)
PLAIN = Tile(block_n=128, block_k=64, num_warps=8, num_stages=3, group_m=8)

# By model, the largest step that a config is for: the fastest of `bench.tune`, V2-Lite's on an H100, V3's on an H200.
Table = tuple[tuple[float, Config], ...]
V2_LITE: Table = (
    (64, Config(block_m=16, gate_up=SWAPPED, down=NARROW)), (128, Config(block_m=32, gate_up=WIDE, down=WIDE_SWAPPED)),
    (512, Config(block_m=64, gate_up=SLIM, down=MIDDLE)),
    (float("inf"), Config(block_m=128, gate_up=replace(LARGE, group_m=4), down=LARGE)))
V3: Table = (
    (64, Config(block_m=16, gate_up=SWAPPED, down=NARROW)), (256, Config(block_m=32, gate_up=SWAPPED, down=NARROW)),
    (512, Config(block_m=64, gate_up=TALL, down=MIDDLE)), (float("inf"), _both(128, LARGE)))
OTHERS: Table = ((128, _both(16, NARROW)), (512, _both(32, WIDE)), (float("inf"), _both(128, PLAIN)))
TABLES: dict[tuple[int, int], Table] = {(2048, 1408): V2_LITE, (7168, 2048): V3}   # by hidden and inner size


def config_for(num_tokens: int, hidden_size: int, inner: int) -> Config:
    return next(config for most, config in TABLES.get((hidden_size, inner), OTHERS) if num_tokens <= most)


def pack_gate_up(gate_up: Tensor) -> Tensor:
    """[E, 2I, D], I gate rows above I up rows -> [E, 2I, D], a gate row and its up row in turn, so that one thread holds both products."""
    num_experts, width, hidden_size = gate_up.shape
    return gate_up.view(num_experts, 2, width // 2, hidden_size).transpose(1, 2).reshape(num_experts, width, hidden_size)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, aligned: Aligned | None = None,
            config: Config | None = None) -> Tensor:
    """weight * down(silu(gate(x)) * up(x)) for every token and each of its experts, not yet summed.

    x        [T, D] bf16 or fp16, contiguous
    gate_up  [E, 2I, D], contiguous, as `pack_gate_up` leaves it
    down     [E, D, I], contiguous
    ids      [T, k] int32, -1 for padding      weights  [T, k] float32, contiguous
    aligned  the ids sorted in blocks of config.block_m, if the router has done that
    returns  [T, k, D]; zeros for padding, whatever x holds there

    Same bits for the same row and config, whatever else is in the batch; the config follows T. Raises ValueError if shapes do not
    fit, or block sizes of `aligned` and `config`. Source: vLLM's fused_moe; swapped sides as in LightLLM's.
    """
    num_tokens, hidden_size = x.shape
    num_experts, inner, top_k = gate_up.shape[0], down.shape[2], ids.shape[1]
    if gate_up.shape[1:] != (2 * inner, hidden_size) or down.shape[:2] != (num_experts, hidden_size) or ids.shape[0] != num_tokens:
        raise ValueError(f"experts: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}, ids {tuple(ids.shape)} "
                         "do not fit")
    out = x.new_empty(num_tokens, top_k, hidden_size)
    if not num_tokens:
        return out
    config = config or config_for(num_tokens, hidden_size, inner)
    aligned = aligned or align(ids, num_experts, config.block_m)
    if aligned.block_m != config.block_m:
        raise ValueError(f"experts: rows are sorted in blocks of {aligned.block_m}, the config has blocks of {config.block_m}")
    h = x.new_empty(aligned.sorted_rows.shape[0], inner)
    _launch(_gate_up, config.gate_up, x, gate_up, h, weights, aligned, top_k, prefetches=config.prefetches)
    _launch(_down, config.down, h, down, out, weights, aligned, top_k, prefetches=config.prefetches)
    return out


def experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`experts` in float32, one expert after another; gate_up as it was before it was packed."""
    out = x.new_zeros(*ids.shape, x.shape[1], dtype=torch.float32)
    for expert in ids[ids >= 0].unique().tolist():
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].float() @ gate_up[expert].float().t()).chunk(2, -1)
        out[tokens, choices] = (F.silu(gate) * up) @ down[expert].float().t() * weights[tokens, choices, None]
    return out


def _launch(kernel: Any, tile: Tile, rows: Tensor, weight: Tensor, out: Tensor, row_weights: Tensor, aligned: Aligned, top_k: int, *,
            prefetches: bool) -> None:
    """Run one of the two products: rows [?, K] by weight [E, N, K]."""
    num_experts, width, depth = weight.shape
    num_tiles = aligned.num_blocks * triton.cdiv(width, tile.block_n)
    grid = min(num_tiles, num_programs(rows.device)) if tile.is_persistent else num_tiles
    row_source: Tensor | TensorDescriptor = rows
    weight_source: Tensor | TensorDescriptor = weight
    if tile.uses_tma:
        weight_source = TensorDescriptor(weight, [num_experts * width, depth], [depth, 1], [tile.block_n, tile.block_k])
        if kernel is _down:
            row_source = TensorDescriptor(rows, [rows.shape[0], depth], [depth, 1], [aligned.block_m, tile.block_k])
    kernel[(grid,)](
        row_source, weight_source, weight, out, row_weights, aligned.sorted_rows, aligned.block_experts, row_weights.numel(),
        aligned.num_blocks, TOP_K=top_k, WIDTH=width, DEPTH=depth, BLOCK_M=aligned.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m, SWAPPED=tile.is_swapped, TMA=tile.uses_tma, PERSISTENT=tile.is_persistent, PREFETCHES=prefetches,
        DOT=dot_dtype(out.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=OVERLAPS)


@triton.jit
def _place(tile, num_blocks, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The tile's block of rows and its first column: within a group of GROUP_M blocks, blocks run fastest."""
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP_M * COLUMN_TILES)
    size = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * COLUMN_TILES)
    return group * GROUP_M + within % size, within // size * BLOCK_N


@triton.jit
def _prefetch(weight, expert, column, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for the first columns of the tile's weights, a cache line of 64 numbers at a time; nothing waits for them."""
    LINES: tl.constexpr = 8
    columns = column + tl.arange(0, BLOCK_N)[:, None]
    offsets = tl.arange(0, LINES)[None, :] * 64
    lines = weight + (expert.to(tl.int64) * WIDTH + tl.minimum(columns, WIDTH - 1)) * DEPTH + tl.minimum(offsets, DEPTH - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _product(row_source, a_rows, a_mask, weight, expert, column, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr, ROWS_BY_TMA: tl.constexpr,
             DOT: tl.constexpr):
    """[BLOCK_M, BLOCK_N] float32: the rows a_rows (the block that begins there if ROWS_BY_TMA) by the expert's weights from `column` on."""
    offsets = tl.arange(0, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    if not ROWS_BY_TMA:
        a_pointers = row_source + a_rows.to(tl.int64)[:, None] * DEPTH + offsets[None, :]
    if not TMA:
        b_pointers = weight + (expert.to(tl.int64) * WIDTH + columns)[:, None] * DEPTH + offsets[None, :]
    if SWAPPED:
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        if ROWS_BY_TMA:
            a = row_source.load([a_rows, k])
        elif DEPTH % BLOCK_K == 0:
            a = tl.load(a_pointers + k, mask=a_mask[:, None], other=0.0)
        else:
            a = tl.load(a_pointers + k, mask=a_mask[:, None] & (offsets < DEPTH - k)[None, :], other=0.0)
        if TMA:
            b = weight.load([expert * WIDTH + column, k])   # past the expert's last column stands the next expert: never stored
        elif DEPTH % BLOCK_K == 0 and WIDTH % BLOCK_N == 0:
            b = tl.load(b_pointers + k)
        else:
            b = tl.load(b_pointers + k, mask=(columns < WIDTH)[:, None] & (offsets < DEPTH - k)[None, :], other=0.0)
        if SWAPPED:
            acc = tl.dot(b.to(DOT), tl.trans(a.to(DOT)), acc)
        else:
            acc = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), acc)
    return tl.trans(acc) if SWAPPED else acc


@triton.jit
def _silu_mul(gate, up):
    """gate * sigmoid(gate) * up, in two approximate instructions each right to about 1e-7; the interpreter has no such functions."""
    if INTERPRETED:
        return gate * tl.sigmoid(gate) * up
    return libdevice.fast_dividef(gate * up, 1.0 + libdevice.fast_expf(-gate))


@triton.jit
def _gate_up_tile(tile, x, weight, h, sorted_rows, block_experts, num_rows, num_blocks, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
                  DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
                  SWAPPED: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, DOT: tl.constexpr):
    block, column = _place(tile, num_blocks, WIDTH, BLOCK_N, GROUP_M)
    expert = tl.load(block_experts + block)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(sorted_rows + slots)
    if PERSISTENT:
        expert = tl.maximum(expert, 0)   # a block of padding multiplies in vain: a branch here would end the overlap of tiles
    elif expert < 0:
        return
    acc = _product(x, rows // TOP_K, rows < num_rows, weight, expert, column, WIDTH, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, SWAPPED, TMA,
                   False, DOT)
    gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
    out_columns = column // 2 + tl.arange(0, BLOCK_N // 2)
    # Slots without a row get zeros: the second product may read whole blocks.
    tl.store(h + slots.to(tl.int64)[:, None] * (WIDTH // 2) + out_columns[None, :],
             _silu_mul(gate, up).to(h.dtype.element_ty), mask=(out_columns < WIDTH // 2)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _gate_up(x, weight, weight_pointer, h, row_weights, sorted_rows, block_experts, num_rows, num_blocks, TOP_K: tl.constexpr,
             WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             GROUP_M: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PREFETCHES: tl.constexpr,
             DOT: tl.constexpr):
    wait_for_earlier()
    if PERSISTENT:
        used = tl.load(block_experts + num_blocks)
        for tile in tl.range(tl.program_id(0), used * ((WIDTH + BLOCK_N - 1) // BLOCK_N), tl.num_programs(0), flatten=True):
            _gate_up_tile(tile, x, weight, h, sorted_rows, block_experts, num_rows, used, TOP_K, WIDTH, DEPTH, BLOCK_M, BLOCK_N, BLOCK_K,
                          GROUP_M, SWAPPED, TMA, PERSISTENT, DOT)
    else:
        _gate_up_tile(tl.program_id(0), x, weight, h, sorted_rows, block_experts, num_rows, num_blocks, TOP_K, WIDTH, DEPTH, BLOCK_M,
                      BLOCK_N, BLOCK_K, GROUP_M, SWAPPED, TMA, PERSISTENT, DOT)


@triton.jit
def _down_tile(tile, h, weight, weight_pointer, out, row_weights, sorted_rows, block_experts, num_rows, num_blocks, WIDTH: tl.constexpr,
               DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
               SWAPPED: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PREFETCHES: tl.constexpr, DOT: tl.constexpr):
    block, column = _place(tile, num_blocks, WIDTH, BLOCK_N, GROUP_M)
    expert = tl.load(block_experts + block)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(sorted_rows + slots)
    is_row = rows < num_rows
    if not PERSISTENT:
        if PREFETCHES:
            is_used = expert >= 0
            if is_used:
                _prefetch(weight_pointer, expert, column, WIDTH, DEPTH, BLOCK_N)
        wait_for_earlier()   # until h is written; the order of the rows was there before the first product began
    columns = column + tl.arange(0, BLOCK_N)
    pointers = out + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    mask = is_row[:, None] & (columns < WIDTH)[None, :]
    if not PERSISTENT and expert < 0:
        tl.store(pointers, tl.zeros([BLOCK_M, BLOCK_N], out.dtype.element_ty), mask=mask)
        return
    scale = tl.load(row_weights + rows, mask=is_row, other=0.0)
    acc = _product(h, block * BLOCK_M if TMA else slots, is_row, weight, tl.maximum(expert, 0), column, WIDTH, DEPTH, BLOCK_M, BLOCK_N,
                   BLOCK_K, SWAPPED, TMA, TMA, DOT)
    acc = tl.where(expert >= 0, acc * scale[:, None], 0.0)
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _down(h, weight, weight_pointer, out, row_weights, sorted_rows, block_experts, num_rows, num_blocks, TOP_K: tl.constexpr,
          WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          GROUP_M: tl.constexpr, SWAPPED: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PREFETCHES: tl.constexpr,
          DOT: tl.constexpr):
    if PERSISTENT:
        wait_for_earlier()
        used = tl.load(block_experts + num_blocks)
        for tile in tl.range(tl.program_id(0), used * ((WIDTH + BLOCK_N - 1) // BLOCK_N), tl.num_programs(0), flatten=True):
            _down_tile(tile, h, weight, weight_pointer, out, row_weights, sorted_rows, block_experts, num_rows, used, WIDTH, DEPTH, BLOCK_M,
                       BLOCK_N, BLOCK_K, GROUP_M, SWAPPED, TMA, PERSISTENT, PREFETCHES, DOT)
    else:
        _down_tile(tl.program_id(0), h, weight, weight_pointer, out, row_weights, sorted_rows, block_experts, num_rows, num_blocks, WIDTH,
                   DEPTH, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SWAPPED, TMA, PERSISTENT, PREFETCHES, DOT)
