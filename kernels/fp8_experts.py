"""The experts of a mixture with block-scaled fp8 weights: as `kernels.experts`, with activations in e4m3 before each product.

Three launches over rows that `kernels.align` sorted: the tokens' rows are quantized into their slots; gate and up together, then
SwiGLU in float32 and quantized again where it stands in registers (a tile is just one group of 128 wide); down, times routing weight.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.align import Aligned, align
from kernels.block_fp8 import BLOCK, BlockFp8
from kernels.fp8_product import block_product
from kernels.launch import dot_dtype
from kernels.quant import Quantized, allocate, quantize_group, quantize_rows_reference, silu_mul_quant_reference

GROUPS = 8    # groups of 128 columns that a program quantizes
_GROUP = tl.constexpr(BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one of the two products is cut up.

    block_n   rows of the weight of a program. Of gate and up always 128 each; of down 64, 128, or 256 as two halves
    group_m   blocks of rows that share a sweep over the weights
    uses_tma  rows and weights come by the bulk copy engine
    """

    num_warps: int
    num_stages: int
    block_n: int = BLOCK
    group_m: int = 1
    uses_tma: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    block_m: int
    gate_up: Tile
    down: Tile


# By rows per expert, if all experts were chosen alike: (at most, config). The fastest of `bench.tune` on an H200; blocks of 128 rows
# spill registers and were slower at every size.
CONFIGS: tuple[tuple[float, Config], ...] = (
    (12, Config(block_m=16, gate_up=Tile(num_warps=4, num_stages=3, uses_tma=True), down=Tile(num_warps=4, num_stages=4))),
    (24, Config(block_m=32, gate_up=Tile(num_warps=4, num_stages=3, uses_tma=True), down=Tile(num_warps=4, num_stages=5, uses_tma=True))),
    (64, Config(block_m=64, gate_up=Tile(num_warps=8, num_stages=5, group_m=4, uses_tma=True),
                down=Tile(num_warps=4, num_stages=4, group_m=4, uses_tma=True))),
    (float("inf"), Config(block_m=64, gate_up=Tile(num_warps=8, num_stages=5, uses_tma=True),
                          down=Tile(num_warps=8, num_stages=5, block_n=256, group_m=4, uses_tma=True))),
)


def config_for(num_rows: int, num_experts: int) -> Config:
    """The table's config for num_rows = T * k rows of num_experts experts."""
    return next(config for most, config in CONFIGS if num_rows <= most * num_experts)


def fp8_experts(x: Tensor, gate_up: BlockFp8, down: BlockFp8, ids: Tensor, weights: Tensor, *, aligned: Aligned | None = None,
                config: Config | None = None) -> Tensor:
    """weight * down(silu(gate(x)) * up(x)) for every token and each of its experts, not yet summed.

    x        [T, D] bfloat16 or float16 (in the interpreter also float32), rows may be strided
    gate_up  [E, 2I, D], I gate rows above I up rows      down  [E, D, I], D and I multiples of 128
    ids      [T, k] int32, -1 for padding                 weights  [T, k] float32, contiguous
    aligned  the ids sorted in blocks of config.block_m, if the router has done that
    returns  [T, k, D] in x's dtype; zeros for padding, whatever x holds there

    Same bits for the same row and config, whatever else is in the batch; the config follows T. Raises ValueError if shapes do not
    fit, or block sizes of `aligned` and `config`. Source: DeepSeek-V3 technical report, 3.3; grouping as in vLLM's fused_moe.
    """
    num_tokens, hidden = x.shape
    num_experts, inner, top_k = gate_up.shape[0], down.shape[2], ids.shape[1]
    if gate_up.shape[1:] != (2 * inner, hidden) or down.shape[:2] != (num_experts, hidden) or ids.shape[0] != num_tokens \
            or hidden % BLOCK or inner % BLOCK:
        raise ValueError(f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} and ids {tuple(ids.shape)} do "
                         f"not fit, or sizes are no multiples of {BLOCK}")
    out = torch.empty(num_tokens, top_k, hidden, dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    config = config or config_for(ids.numel(), num_experts)
    aligned = aligned or align(ids, num_experts, config.block_m)
    if aligned.block_m != config.block_m:
        raise ValueError(f"rows are sorted in blocks of {aligned.block_m}, the config has blocks of {config.block_m}")
    num_slots = aligned.num_blocks * aligned.block_m
    slots = allocate(num_slots, hidden, x.device)
    _quantize_slots[(num_slots, triton.cdiv(hidden // BLOCK, GROUPS))](
        x, *slots, aligned.sorted_rows, aligned.block_experts, ids.numel(), num_slots, x.stride(0),
        TOP_K=top_k, WIDTH=hidden, BLOCK_M=aligned.block_m, GROUPS=GROUPS, num_warps=1)
    h = allocate(num_slots, inner, x.device)
    _launch(_gate_up, config.gate_up, slots, gate_up, inner // BLOCK, 2, h.data, h.scale, aligned, ids.numel())
    halves = max(1, config.down.block_n // BLOCK)
    _launch(_down, config.down, h, down, triton.cdiv(hidden, config.down.block_n), halves, out, weights, aligned, ids.numel())
    return out


def fp8_experts_reference(x: Tensor, gate_up: BlockFp8, down: BlockFp8, ids: Tensor, weights: Tensor) -> Tensor:
    """`fp8_experts` in float32, one expert after another."""
    out = x.new_zeros(*ids.shape, x.shape[1], dtype=torch.float32)
    rounded = _dequantized(quantize_rows_reference(x))
    for expert in range(gate_up.shape[0]):
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        if len(tokens):
            h = _dequantized(silu_mul_quant_reference(rounded[tokens] @ _matrix(gate_up, expert).t()))
            out[tokens, choices] = weights[tokens, choices, None] * (h @ _matrix(down, expert).t())
    return out


def _matrix(weight: BlockFp8, expert: int) -> Tensor:
    return BlockFp8(weight.data[expert], weight.scale[expert]).dequantized(torch.float32)


def _dequantized(rows: Quantized) -> Tensor:
    wide: Tensor = rows.data.float().unflatten(-1, (-1, BLOCK)) * rows.scale.unsqueeze(-1)
    return wide.flatten(-2)


def _launch(kernel: object, tile: Tile, rows: Quantized, weight: BlockFp8, num_tiles: int, halves: int, out: Tensor, extra: Tensor,
            aligned: Aligned, num_rows: int) -> None:
    """Run one of the two products over slots [?, K] and weight [E, N, K]; `extra` is what its epilogue reads or writes besides."""
    num_experts, width, depth = weight.shape
    block_n = min(tile.block_n, BLOCK)
    row_source: Tensor | TensorDescriptor = rows.data
    weight_source: Tensor | TensorDescriptor = weight.data
    if tile.uses_tma:
        row_source = TensorDescriptor(rows.data, [rows.data.shape[0], depth], [depth, 1], [aligned.block_m, BLOCK])
        weight_source = TensorDescriptor(weight.data, [num_experts * width, depth], [depth, 1], [block_n, BLOCK])
    kernel[(aligned.num_blocks * num_tiles,)](  # type: ignore[index]
        row_source, rows.scale, weight_source, weight.scale, out, extra, aligned.sorted_rows, aligned.block_experts, num_rows,
        aligned.num_blocks, rows.data.shape[0], depth // BLOCK, WIDTH=width, DEPTH=depth, BLOCK_M=aligned.block_m, BLOCK_N=block_n,
        HALVES=halves, TILES=num_tiles, GROUP_M=tile.group_m, TMA=tile.uses_tma, DOT=dot_dtype(torch.float8_e4m3fn),
        num_warps=tile.num_warps, num_stages=tile.num_stages)


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _quantize_slots(x, data, scales, sorted_rows, block_experts, num_rows, num_slots, x_stride, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
                    BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Every slot gets its token's row; slots without a row and blocks without an expert stay as they are, and are never used."""
    slot = tl.program_id(0)
    if tl.load(block_experts + slot // BLOCK_M) < 0:
        return
    row = tl.load(sorted_rows + slot)
    if row >= num_rows:
        return
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    numbers = tl.load(x + (row // TOP_K).to(tl.int64) * x_stride + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    quantized, scale = quantize_group(numbers, 1)
    tl.store(data + slot.to(tl.int64) * WIDTH + columns, quantized, mask=columns < WIDTH)
    tl.store(scales + groups.to(tl.int64) * num_slots + slot, scale, mask=groups < WIDTH // _GROUP)


@triton.jit
def _place(num_blocks, TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's block of rows and tile of the weight: within a group of GROUP_M blocks, blocks run fastest."""
    group = tl.program_id(0) // (GROUP_M * TILES)
    size = tl.minimum(num_blocks - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * TILES)
    return group * GROUP_M + within % size, within // size


@triton.jit
def _product(rows, row_scales, w, w_scales, first_slot, num_slots, expert, first_row, second_row, num_steps, WIDTH: tl.constexpr,
             DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, TMA: tl.constexpr,
             DOT: tl.constexpr):
    """The expert's weights from first_row and from second_row on, by the slots of a block."""
    STEPS: tl.constexpr = DEPTH // _GROUP
    scales = w_scales + expert.to(tl.int64) * ((WIDTH + _GROUP - 1) // _GROUP * STEPS)
    low = w
    if not TMA:
        columns = tl.arange(0, _GROUP)[None, :]
        rows += (first_slot + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * DEPTH + columns
        inside = tl.arange(0, BLOCK_N)[:, None] * DEPTH + columns
        low = w + (expert.to(tl.int64) * WIDTH + second_row) * DEPTH + inside
        w += (expert.to(tl.int64) * WIDTH + first_row) * DEPTH + inside
    return block_product(rows, first_slot, row_scales + first_slot + tl.arange(0, BLOCK_M), num_slots, w, expert * WIDTH + first_row,
                         scales + first_row // _GROUP * STEPS, low, expert * WIDTH + second_row, scales + second_row // _GROUP * STEPS, 0,
                         num_steps, STEPS, BLOCK_N, BLOCK_M, HALVES, False, TMA, DOT)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_steps"])
def _gate_up(rows, row_scales, w, w_scales, h, h_scales, sorted_rows, block_experts, num_rows, num_blocks, num_slots, num_steps,
             WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
             TILES: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr):
    block, tile = _place(num_blocks, TILES, GROUP_M)
    expert = tl.load(block_experts + block)
    if expert < 0:
        return
    first = tile * BLOCK_N
    gate, up = _product(rows, row_scales, w, w_scales, block * BLOCK_M, num_slots, expert, first, WIDTH // 2 + first, num_steps, WIDTH,
                        DEPTH, BLOCK_M, BLOCK_N, 2, TMA, DOT)
    data, scale = quantize_group(gate * tl.sigmoid(gate) * up, 0)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(h + slots.to(tl.int64)[:, None] * (WIDTH // 2) + (first + tl.arange(0, BLOCK_N))[None, :], tl.trans(data))
    tl.store(h_scales + tile.to(tl.int64) * num_slots + slots, scale)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_steps"])
def _down(rows, row_scales, w, w_scales, out, row_weights, sorted_rows, block_experts, num_rows, num_blocks, num_slots, num_steps,
          WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
          TILES: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr, DOT: tl.constexpr):
    block, tile = _place(num_blocks, TILES, GROUP_M)
    expert = tl.load(block_experts + block)
    positions = tl.load(sorted_rows + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_row = positions < num_rows
    first = tile * (BLOCK_N * HALVES)
    second = tl.minimum(first + BLOCK_N, WIDTH - BLOCK_N)          # where the weight ends with the first half, never stored
    columns = first + tl.arange(0, BLOCK_N)
    pointers = out + positions.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    is_low = is_row[:, None] & (columns < WIDTH - BLOCK_N)[None, :]
    if expert < 0:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        tl.store(pointers, zeros, mask=is_row[:, None])
        if HALVES == 2:
            tl.store(pointers + BLOCK_N, zeros, mask=is_low)
        return
    weight = tl.load(row_weights + positions, mask=is_row, other=0.0)[:, None]
    acc, low_acc = _product(rows, row_scales, w, w_scales, block * BLOCK_M, num_slots, expert, first, second, num_steps, WIDTH, DEPTH,
                            BLOCK_M, BLOCK_N, HALVES, TMA, DOT)
    tl.store(pointers, (tl.trans(acc) * weight).to(out.dtype.element_ty), mask=is_row[:, None])
    if HALVES == 2:
        tl.store(pointers + BLOCK_N, (tl.trans(low_acc) * weight).to(out.dtype.element_ty), mask=is_low)
