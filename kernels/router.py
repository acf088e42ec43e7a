"""The router's logits of small steps: one short product, its depth split among programs so that the whole device reads the gate at once.

Leaves float32 partial sums, which `kernels.routing` adds up in their order as it reads them: a sum of its own would cost a launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import OVERLAPS, dot_dtype, wait_for_earlier

MOST_TOKENS = 256   # a larger step keeps the vendor's product busy


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program multiplies block_t tokens by block_e experts over `num_tiles` tiles of block_k columns."""

    block_t: int
    block_e: int
    block_k: int
    num_warps: int
    num_tiles: int = 1
    num_stages: int = 2


# By model, the largest step that a config is for.
Table = tuple[tuple[float, Config], ...]
V2_LITE: Table = (
    (4, Config(block_t=16, block_e=32, block_k=64, num_warps=2, num_tiles=2, num_stages=3)),
    (16, Config(block_t=16, block_e=16, block_k=64, num_warps=1, num_tiles=4, num_stages=3)),
    (64, Config(block_t=16, block_e=32, block_k=256, num_warps=2, num_tiles=2, num_stages=3)),
    (float("inf"), Config(block_t=32, block_e=64, block_k=128, num_warps=4, num_tiles=2)))
V3: Table = (
    (16, Config(block_t=16, block_e=64, block_k=256, num_warps=4)),
    (64, Config(block_t=32, block_e=64, block_k=128, num_warps=4, num_tiles=4, num_stages=3)),
    (float("inf"), Config(block_t=64, block_e=64, block_k=128, num_warps=4, num_tiles=7, num_stages=3)))
TABLES: dict[tuple[int, int], Table] = {(64, 2048): V2_LITE, (256, 7168): V3}   # by experts and hidden size


def config_for(num_tokens: int, num_experts: int, hidden_size: int) -> Config:
    return next(config for most, config in TABLES.get((num_experts, hidden_size), V3) if num_tokens <= most)


def router(x: Tensor, gate: Tensor, *, config: Config | None = None) -> Tensor:
    """x @ gate.T in parts whose sum it is.

    x        [T, D] bf16 or fp16, rows may be strided
    gate     [E, D], contiguous, of x's type
    returns  [S, T, E] float32, S parts of the depth as the config cuts it

    Same bits for the same row and config, whatever else is in the batch. Raises ValueError if shapes or types do not fit.
    """
    (num_tokens, depth), num_experts = x.shape, gate.shape[0]
    if gate.shape[1] != depth or gate.dtype != x.dtype or x.stride(1) != 1:
        raise ValueError(f"router: x {x.dtype} {tuple(x.shape)} with strides {x.stride()} and gate {gate.dtype} {tuple(gate.shape)} do not "
                         "fit")
    config = config or config_for(num_tokens, num_experts, depth)
    num_splits = triton.cdiv(depth, config.block_k * config.num_tiles)
    out = torch.empty(num_splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if num_tokens:
        _router[(triton.cdiv(num_tokens, config.block_t), triton.cdiv(num_experts, config.block_e), num_splits)](
            x, gate, out, num_tokens, x.stride(0), NUM_EXPERTS=num_experts, DEPTH=depth, BLOCK_T=config.block_t, BLOCK_E=config.block_e,
            BLOCK_K=config.block_k, NUM_TILES=config.num_tiles, DOT=dot_dtype(x.dtype), num_warps=config.num_warps,
            num_stages=config.num_stages, launch_pdl=OVERLAPS)
    return out


def router_reference(x: Tensor, gate: Tensor) -> Tensor:
    """The sum of the parts, [T, E]."""
    return x.float() @ gate.float().t()


@triton.jit(do_not_specialize=["num_tokens"])
def _router(x, gate, out, num_tokens, row_stride, NUM_EXPERTS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, DOT: tl.constexpr):
    IS_WHOLE: tl.constexpr = DEPTH % (BLOCK_K * NUM_TILES) == 0
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    is_token, is_expert = tokens < num_tokens, experts < NUM_EXPERTS
    offsets = tl.arange(0, BLOCK_K)
    rows = x + tokens.to(tl.int64)[:, None] * row_stride + offsets[None, :]
    gate_rows = gate + experts[:, None] * DEPTH + offsets[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    wait_for_earlier()
    for tile in range(NUM_TILES):
        k = (split * NUM_TILES + tile) * BLOCK_K
        if IS_WHOLE:
            a = tl.load(rows + k, mask=is_token[:, None], other=0.0)
            b = tl.load(gate_rows + k, mask=is_expert[:, None], other=0.0)
        else:
            is_in = (offsets < DEPTH - k)[None, :]
            a = tl.load(rows + k, mask=is_token[:, None] & is_in, other=0.0)
            b = tl.load(gate_rows + k, mask=is_expert[:, None] & is_in, other=0.0)
        acc = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), acc)
    tl.store(out + (split * num_tokens + tokens)[:, None].to(tl.int64) * NUM_EXPERTS + experts[None, :], acc,
             mask=is_token[:, None] & is_expert[None, :])
