"""Causal attention of prompts over decompressed keys and values, at the sizes of DeepSeek-V2-Lite (16 heads) and V3 (128 heads)."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernel_case import KernelCase, Prepared
from kernels import mla_prefill as module
from kernels.mla_prefill import Config, mla_prefill, mla_prefill_reference

NOPE, ROPE, V, LATENT = 128, 64, 128, 512
SCALE = (NOPE + ROPE) ** -0.5
COLD_BYTES = 200 << 20   # between two uses of one input set: three times the L2 cache
Lens = Sequence[tuple[int, int]]   # new tokens, all tokens

# block_m, block_n, warps, stages: those whose products the assembler does not run one after another (it says so as C7515)
TILES = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2), (64, 128, 4, 2))
CONFIGS = [Config(block_m=block_m, block_n=block_n, heads_per_group=heads, num_warps=warps, num_stages=stages)
           for (block_m, block_n, warps, stages), heads in product(TILES, (4, 1, 2, 8, 16))]


def cases() -> list[KernelCase]:
    ragged = [(length, length) for length in (2048, 96, 1500, 700, 1024, 310, 1650, 864)]
    return [
        _case(16, "1024 tokens", [(1024, 1024)], bar=">= 103 TFLOPS"),
        _case(16, "4096 tokens", [(4096, 4096)], bar=">= 450 TFLOPS"),
        _case(16, "8192 tokens", [(8192, 8192)], bar=">= 550 TFLOPS"),
        _case(16, "8 x 1024 tokens", [(1024, 1024)] * 8),
        _case(16, "8 of 96 to 2048 tokens", ragged),
        _case(16, "2048 tokens after 6144", [(2048, 8192)]),
        _case(16, "32 x 128 tokens after 1024", [(128, 1152)] * 32),
        _case(128, "4096 tokens", [(4096, 4096)]),
        _case(128, "4 x 1024 tokens", [(1024, 1024)] * 4),
    ]


def offline_calls() -> list[Callable[[], object]]:
    return [partial(_call, config, _inputs(num_heads, [(256, 256)], torch.device("cpu")), 256)
            for num_heads in (16, 128) for config in module.CONFIGS.values()]


def _case(num_heads: int, lengths: str, lens: Lens, bar: str = "") -> KernelCase:
    num_queries, num_keys = (sum(column) for column in zip(*lens, strict=True))
    num_bytes = 2 * num_heads * (num_queries * (NOPE + ROPE + V) + num_keys * (NOPE + V)) + 2 * num_keys * ROPE
    num_pairs = sum(new * total - new * new // 2 for new, total in lens)

    def setup() -> Prepared:
        device = torch.device("cuda")
        sets = [_inputs(num_heads, lens, device) for _ in range(max(2, -(-COLD_BYTES // num_bytes)))]
        peers: dict[str, Callable[[int], object]] = {}
        if all(pair == lens[0] for pair in lens) and lens[0][0] == lens[0][1]:
            dense = [_per_head(*inputs, num_seqs=len(lens)) for inputs in sets]
            peers["cuDNN SDPA, keys joined beforehand"] = lambda index: _sdpa(*dense[index])
        return Prepared(run=lambda config, index: _call(config, sets[index], max(new for new, _ in lens)),
                        reference=lambda index: mla_prefill_reference(*sets[index], SCALE), num_sets=len(sets), configs=CONFIGS,
                        peers=peers)

    return KernelCase(kernel="mla_prefill", shape=f"H {num_heads}, {lengths}", num_bytes=num_bytes, rate="bf16", setup=setup, bar=bar,
                      num_flops=2 * num_pairs * num_heads * (NOPE + ROPE + V))


def _inputs(num_heads: int, lens: Lens, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As mla_prefill takes them: q, kv, k_rope, cu_q, cu_k."""
    bounds = [torch.tensor([0, *column], device=device).cumsum(0).int() for column in zip(*lens, strict=True)]
    num_queries, num_keys = (sum(column) for column in zip(*lens, strict=True))
    q = torch.randn(num_queries, num_heads, NOPE + ROPE, dtype=torch.bfloat16, device=device)
    kv = torch.randn(num_keys, num_heads, NOPE + V, dtype=torch.bfloat16, device=device)
    latents = torch.randn(num_keys, LATENT + ROPE, dtype=torch.bfloat16, device=device)
    return q, kv, latents[:, LATENT:], bounds[0], bounds[1]


def _call(config: Config | None, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], max_q: int) -> Tensor:
    return mla_prefill(*inputs, max_q, SCALE, config=config)


def _per_head(q: Tensor, kv: Tensor, k_rope: Tensor, cu_q: Tensor, cu_k: Tensor, num_seqs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys with the shared part copied to every head, values: [num_seqs, H, S, d]."""
    keys = torch.cat((kv[..., :NOPE], k_rope.unsqueeze(1).expand(-1, kv.shape[1], -1)), -1)
    queries, keys, values = (rows.unflatten(0, (num_seqs, -1)).transpose(1, 2) for rows in (q, keys, kv[..., NOPE:]))
    return queries, keys, values


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=SCALE)
