"""Decode attention with grouped heads at the sizes of Llama-3.1-8B, Qwen2-0.5B and a model without groups."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.decode_batch import PAGE_SIZE, make_batches, ragged
from bench.kernel_case import KernelCase, Prepared
from kernels.gqa_decode import Config, gqa_decode, gqa_decode_reference, num_splits
from kernels.split_schedule import SplitSchedule

Heads = tuple[int, int, int]     # H, KV, d
LLAMA_8B: Heads = (32, 8, 128)
QWEN_HALF_B: Heads = (14, 2, 64)
UNGROUPED: Heads = (32, 32, 96)
CONFIGS = [Config(block_n=block_n, num_warps=warps, num_stages=stages, programs_per_multiprocessor=programs)
           for (stages, programs), block_n, warps in product(((2, 3), (3, 2), (4, 1), (2, 2), (3, 1)), (64, 32), (4, 8))]


def cases() -> list[KernelCase]:
    return [
        _case(LLAMA_8B, [1024]),
        _case(LLAMA_8B, [32_768]),
        _case(LLAMA_8B, [4096] * 16),
        _case(LLAMA_8B, [1024] * 64),
        _case(LLAMA_8B, [4096] * 128),
        _case(LLAMA_8B, ragged(128, 8192)),
        _case(QWEN_HALF_B, [1024] * 64),
        _case(QWEN_HALF_B, [4096] * 128),
        _case(UNGROUPED, [4096] * 32),
    ]


def offline_calls() -> list[Callable[[], object]]:
    shapes = (LLAMA_8B, QWEN_HALF_B, UNGROUPED, (16, 8, 256))
    return [partial(_Sets(heads, [4096, 100], torch.device("cpu"), []).run, None, 0) for heads in shapes]


class _Sets:
    """Input sets over one cache, and a schedule for each number of programs that a config asks for."""

    def __init__(self, heads: Heads, lens: list[int], device: torch.device, configs: list[Config]) -> None:
        num_heads, num_kv_heads, head_dim = heads
        self.batches = make_batches(lens, sum(lens) * num_kv_heads * head_dim * 4, device)
        on_device = device.type == "cuda"
        self.cache = (torch.randn if on_device else torch.empty)(2, self.batches.num_slots, num_kv_heads, head_dim, dtype=torch.bfloat16,
                                                                 device=device)
        self.q = torch.randn(len(lens), num_heads, head_dim, dtype=torch.bfloat16, device=device)
        self.out = torch.empty_like(self.q)
        self.schedules = {count: SplitSchedule.allocate(len(lens), count, device)
                          for count in {self._num_splits(config) for config in (None, *configs)}}
        if on_device:
            for schedule in self.schedules.values():
                schedule.refill(self.batches.seq_lens, len(lens))

    def _num_splits(self, config: Config | None) -> int:
        return num_splits(self.cache.shape[2], self.cache.shape[3], self.cache.device, config)

    def run(self, config: Config | None, index: int) -> Tensor:
        schedule = self.schedules[self._num_splits(config)]
        return gqa_decode(self.q, self.cache, self.batches.page_tables[index], self.batches.seq_lens, schedule, self.cache.shape[3] ** -0.5,
                          PAGE_SIZE, self.out, config)

    def reference(self, index: int) -> Tensor:
        return gqa_decode_reference(self.q, self.cache, self.batches.page_tables[index], self.batches.seq_lens, self.cache.shape[3] ** -0.5,
                                    PAGE_SIZE)


def _case(heads: Heads, lens: list[int]) -> KernelCase:
    num_heads, num_kv_heads, head_dim = heads

    def setup() -> Prepared:
        sets = _Sets(heads, lens, torch.device("cuda"), CONFIGS)
        num_sets = len(sets.batches.page_tables)
        peers: dict[str, Callable[[int], object]] = {}
        if len(set(lens)) == 1:
            dense = [sets.cache[:, sets.batches.slots(index, lens[0])].transpose(2, 3) for index in range(num_sets)]
            peers["torch SDPA, dense"] = lambda index: _sdpa(sets.q, dense[index])
        return Prepared(run=sets.run, reference=sets.reference, num_sets=num_sets, configs=CONFIGS, peers=peers)

    lengths = f"{len(lens)} x {lens[0]} tokens" if len(set(lens)) == 1 else f"{len(lens)} of 1 to {max(lens)} tokens"
    return KernelCase(
        kernel="gqa_decode", shape=f"H {num_heads}/{num_kv_heads} d {head_dim}, {lengths}", rate="bf16", setup=setup,
        num_bytes=4 * (sum(lens) * num_kv_heads + len(lens) * num_heads) * head_dim,
        num_flops=4 * sum(lens) * num_heads * head_dim)


def _sdpa(q: Tensor, cache: Tensor) -> Tensor:
    """q [N, H, d], cache [2, N, KV, S, d]"""
    return F.scaled_dot_product_attention(q.unsqueeze(2), cache[0], cache[1], enable_gqa=True)
