"""Causal attention of prompts over paged keys and values, at the sizes of Llama 3 8B (32 heads on 8) and Qwen2 7B (28 on 4)."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernel_case import KernelCase, Prepared
from kernels import gqa_prefill as module
from kernels.gqa_prefill import Config, gqa_prefill, gqa_prefill_reference

PAGE_SIZE = 64
COLD_BYTES = 200 << 20   # between two uses of one input set: three times the L2 cache
Lens = Sequence[tuple[int, int]]   # new tokens, all tokens

TILES = ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3))  # block_m, block_n, warps, stages
CONFIGS = [Config(block_m=block_m, block_n=block_n, heads_per_group=heads, num_warps=warps, num_stages=stages)
           for (block_m, block_n, warps, stages), heads in product(TILES, (8, 1, 2, 4, 16))]


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int


class Inputs(NamedTuple):
    q: Tensor
    cache: Tensor
    page_table: Tensor
    cu_q: Tensor
    seq_lens: Tensor


LLAMA, QWEN, SMALL = Heads(32, 8, 128), Heads(28, 4, 128), Heads(16, 4, 64)


def cases() -> list[KernelCase]:
    return [
        _case(LLAMA, "4096 tokens", [(4096, 4096)]),
        _case(LLAMA, "8192 tokens", [(8192, 8192)]),
        _case(LLAMA, "8 x 1024 tokens", [(1024, 1024)] * 8),
        _case(LLAMA, "2048 tokens after 6144", [(2048, 8192)]),
        _case(LLAMA, "32 x 64 tokens after 1024", [(64, 1088)] * 32),
        _case(QWEN, "8 x 1024 tokens", [(1024, 1024)] * 8),
        _case(SMALL, "8 x 1024 tokens", [(1024, 1024)] * 8),
    ]


def offline_calls() -> list[Callable[[], object]]:
    return [partial(_call, config, _inputs(heads, [(256, 256)], torch.device("cpu")), 256)
            for heads in (LLAMA, SMALL, Heads(16, 8, 256)) for config in module.CONFIGS.values()]


def _case(heads: Heads, lengths: str, lens: Lens) -> KernelCase:
    num_queries, num_keys = (sum(column) for column in zip(*lens, strict=True))
    num_bytes = 2 * heads.dim * (2 * num_queries * heads.q + 2 * num_keys * heads.kv)
    num_pairs = sum(new * total - new * new // 2 for new, total in lens)

    def setup() -> Prepared:
        sets = [_inputs(heads, lens, torch.device("cuda")) for _ in range(max(2, -(-COLD_BYTES // num_bytes)))]
        peers: dict[str, Callable[[int], object]] = {}
        if all(pair == lens[0] for pair in lens) and lens[0][0] == lens[0][1]:
            dense = [_per_head(inputs) for inputs in sets]
            peers["SDPA, not paged"] = lambda index: _sdpa(*dense[index])
        return Prepared(run=lambda config, index: _call(config, sets[index], max(new for new, _ in lens)),
                        reference=lambda index: gqa_prefill_reference(*sets[index], heads.dim ** -0.5, PAGE_SIZE), num_sets=len(sets),
                        configs=CONFIGS, peers=peers)

    return KernelCase(kernel="gqa_prefill", shape=f"H {heads.q} on {heads.kv}, d {heads.dim}, {lengths}", num_bytes=num_bytes,
                      num_flops=4 * num_pairs * heads.q * heads.dim, rate="bf16", setup=setup)


def _inputs(heads: Heads, lens: Lens, device: torch.device) -> Inputs:
    """As gqa_prefill takes them, on shuffled pages."""
    counts = [-(-total // PAGE_SIZE) for _, total in lens]
    page_table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for seq, pages in enumerate(torch.randperm(sum(counts)).int().split(counts)):
        page_table[seq, : counts[seq]] = pages
    num_queries = sum(new for new, _ in lens)
    q = torch.randn(num_queries, heads.q + 2 * heads.kv, heads.dim, dtype=torch.bfloat16, device=device)[:, : heads.q]
    cache = torch.randn(2, sum(counts) * PAGE_SIZE, heads.kv, heads.dim, dtype=torch.bfloat16, device=device)
    cu_q = torch.tensor([0, *(new for new, _ in lens)], device=device).cumsum(0).int()
    return Inputs(q, cache, page_table.to(device), cu_q, torch.tensor([total for _, total in lens], dtype=torch.int32, device=device))


def _call(config: Config | None, inputs: Inputs, max_q: int) -> Tensor:
    return gqa_prefill(*inputs, max_q, inputs.q.shape[2] ** -0.5, PAGE_SIZE, config=config)


def _per_head(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of equally long prompts, out of their pages: [B, heads, S, d]."""
    num_seqs, per_seq = inputs.page_table.shape[0], inputs.q.shape[0] // inputs.page_table.shape[0]
    token = torch.arange(per_seq, device=inputs.q.device)
    slots = inputs.page_table.long()[:, token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE
    keys, values = (plane[slots].transpose(1, 2) for plane in inputs.cache)
    return inputs.q.unflatten(0, (num_seqs, -1)).transpose(1, 2), keys, values


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
