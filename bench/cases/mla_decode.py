"""Decode attention over paged latents at the sizes of DeepSeek-V2-Lite (16 heads) and V3 (128 heads)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.decode_batch import PAGE_SIZE, make_batches, ragged
from bench.kernel_case import KernelCase, Prepared
from kernels.mla_decode import Config, mla_decode, mla_decode_reference, num_splits
from kernels.split_schedule import SplitSchedule

LATENT, ROPE = 512, 64
SCALE = 192**-0.5

# block_h, block_n, tokens_as_rows, warps, stages, programs per multiprocessor: what fits
FEW_HEADS = (
    (16, 64, True, 4, 2, 1), (16, 64, True, 8, 2, 1), (16, 64, False, 8, 3, 1), (16, 64, False, 4, 3, 1), (16, 32, False, 8, 5, 1),
    (16, 32, False, 8, 4, 1), (16, 32, False, 8, 3, 1), (16, 32, False, 4, 3, 2), (16, 32, True, 4, 3, 1), (64, 64, False, 8, 3, 1),
)
MANY_HEADS = (
    (64, 64, False, 8, 3, 1), (64, 64, False, 8, 2, 1), (64, 64, True, 8, 2, 1), (64, 32, False, 8, 5, 1), (64, 32, False, 8, 4, 1),
    (32, 64, True, 4, 2, 1), (32, 64, True, 8, 2, 1), (16, 64, True, 4, 2, 1),
)


def cases() -> list[KernelCase]:
    return [
        _case(16, [1024], bar="<= 12 us"),
        _case(16, [4096]),
        _case(16, [32_768]),
        _case(16, [1024] * 16),
        _case(16, [4096] * 16, bar=">= 1,886 GB/s"),
        _case(16, [1024] * 64),
        _case(16, [4096] * 64, bar=">= 2,516 GB/s"),
        _case(16, [4096] * 128, bar=">= 2,700 GB/s"),
        _case(16, [1024] * 256),
        _case(16, [16_384] * 128, bar=">= 2,936 GB/s"),
        _case(16, ragged(128, 8192)),
        _case(128, [1024]),
        _case(128, [4096] * 16),
        _case(128, [4096] * 64, bar=">= 400 TFLOPS"),
        _case(128, [4096] * 128, bar=">= 400 TFLOPS"),
        _case(128, ragged(128, 8192)),
    ]


def offline_calls() -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = []
    for num_heads in (16, 32, 128):
        sets = _Sets(num_heads, [4096, 100], torch.device("cpu"), [])
        calls += [partial(sets.run, None, 0), sets.refill]
    return calls


def configs_for(num_heads: int) -> list[Config]:
    return [Config(block_h=block_h, block_n=block_n, tokens_as_rows=tokens_as_rows, use_tma=use_tma, num_warps=warps, num_stages=stages,
                   programs_per_multiprocessor=programs)
            for block_h, block_n, tokens_as_rows, warps, stages, programs in (MANY_HEADS if num_heads > 32 else FEW_HEADS)
            for use_tma in (True, False)]


class _Sets:
    """Input sets over one cache, and a schedule for each number of programs that a config asks for."""

    def __init__(self, num_heads: int, lens: list[int], device: torch.device, configs: list[Config]) -> None:
        self.batches = make_batches(lens, sum(lens) * (LATENT + ROPE) * 2, device)
        shape = (self.batches.num_slots, LATENT + ROPE)
        on_device = device.type == "cuda"
        self.cache = (torch.randn if on_device else torch.empty)(*shape, dtype=torch.bfloat16, device=device)
        self.q = torch.randn(len(lens), num_heads, LATENT + ROPE, dtype=torch.bfloat16, device=device)
        self.out = torch.empty(len(lens), num_heads, LATENT, dtype=torch.bfloat16, device=device)
        self.num_heads = num_heads
        self.schedules = {count: SplitSchedule.allocate(len(lens), count, device)
                          for count in {num_splits(num_heads, device, config) for config in (None, *configs)}}
        if on_device:
            self.refill()

    def refill(self) -> None:
        for schedule in self.schedules.values():
            schedule.refill(self.batches.seq_lens, len(self.batches.seq_lens))

    def run(self, config: Config | None, index: int) -> Tensor:
        schedule = self.schedules[num_splits(self.num_heads, self.cache.device, config)]
        return mla_decode(self.q[..., :LATENT], self.q[..., LATENT:], self.cache, self.batches.page_tables[index], self.batches.seq_lens,
                          schedule, SCALE, PAGE_SIZE, self.out, config)

    def reference(self, index: int) -> Tensor:
        return mla_decode_reference(self.q[..., :LATENT], self.q[..., LATENT:], self.cache, self.batches.page_tables[index],
                                    self.batches.seq_lens, SCALE, PAGE_SIZE)


def _case(num_heads: int, lens: list[int], bar: str = "") -> KernelCase:
    def setup() -> Prepared:
        configs = configs_for(num_heads)
        sets = _Sets(num_heads, lens, torch.device("cuda"), configs)
        num_sets = len(sets.batches.page_tables)
        peers: dict[str, Callable[[int], object]] = {}
        if len(set(lens)) == 1:
            dense = [sets.cache[sets.batches.slots(index, lens[0])].unsqueeze(1) for index in range(num_sets)]
            peers["torch SDPA, dense"] = lambda index: _sdpa(sets.q, dense[index])
        return Prepared(run=sets.run, reference=sets.reference, num_sets=num_sets, configs=configs, peers=peers)

    lengths = f"{len(lens)} x {lens[0]} tokens" if len(set(lens)) == 1 else f"{len(lens)} of 1 to {max(lens)} tokens"
    return KernelCase(
        kernel="mla_decode", shape=f"H {num_heads}, {lengths}", rate="bf16", setup=setup, bar=bar,
        num_bytes=2 * (sum(lens) * (LATENT + ROPE) + len(lens) * num_heads * (2 * LATENT + ROPE)),
        num_flops=2 * sum(lens) * num_heads * (2 * LATENT + ROPE))


def _sdpa(q: Tensor, latents: Tensor) -> Tensor:
    """q [N, H, 576], latents [N, 1, S, 576]: the heads stand as queries of one head."""
    return F.scaled_dot_product_attention(q.unsqueeze(1), latents, latents[..., :LATENT], scale=SCALE)
