"""Causal attention over paged keys and values, against the plain float32 computation of each sequence by itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import gqa_prefill as module
from kernels.gqa_prefill import Config, gqa_prefill, gqa_prefill_reference

SCALE = 0.25
SMALL = Config(block_m=16, block_n=16, heads_per_group=2, num_warps=4, num_stages=2)
TALL = replace(SMALL, block_m=32, block_n=32)


class Batch:
    """Sequences as (new tokens, all tokens) on shuffled pages. Everything that is none of theirs is NaN, or a page far outside."""

    def __init__(self, lens: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, *, num_heads: int = 4, num_kv_heads: int = 2,
                 head_dim: int = 16, page_size: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // page_size) for _, length in lens]
        num_pages = sum(counts) + 2
        pages = torch.randperm(num_pages, generator=generator).int().split([*counts, 2])
        self.page_size = page_size
        self.page_table = torch.full((len(lens), max(counts) + 1), 1 << 24, dtype=torch.int32)
        cache = torch.full((2, num_pages * page_size, num_kv_heads, head_dim), float("nan"))
        for seq, (_, length) in enumerate(lens):
            self.page_table[seq, : counts[seq]] = pages[seq]
            token = torch.arange(length)
            slots = pages[seq].long()[token // page_size] * page_size + token % page_size
            cache[:, slots] = torch.randn(2, length, num_kv_heads, head_dim, generator=generator)
        self.num_queries = sum(new for new, _ in lens)
        queries = torch.randn(self.num_queries + 3, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
        queries[self.num_queries :] = float("nan")
        self.q = queries.to(device, dtype)[:, :num_heads]                      # strided, as a part of a wider product is
        self.cache, self.page_table = cache.to(device, dtype), self.page_table.to(device)
        self.cu_q = torch.tensor([0, *(new for new, _ in lens)], device=device).cumsum(0).int()
        self.seq_lens = torch.tensor([length for _, length in lens], dtype=torch.int32, device=device)
        self.max_q = max(new for new, _ in lens)

    def run(self, config: Config | None = None, out: Tensor | None = None) -> Tensor:
        return gqa_prefill(self.q, self.cache, self.page_table, self.cu_q, self.seq_lens, self.max_q, SCALE, self.page_size, out, config)

    def expected(self) -> Tensor:
        return gqa_prefill_reference(self.q, self.cache, self.page_table, self.cu_q, self.seq_lens, SCALE,
                                     self.page_size)[: self.num_queries]

    def error(self, config: Config | None = None) -> float:
        expected = self.expected()
        return float((self.run(config)[: self.num_queries].float() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize(("config", "page_size"), [(SMALL, 16), (TALL, 32), (TALL, 16), (SMALL, 64)],
                         ids=["a page a block", "large blocks", "blocks cut to pages", "blocks inside pages"])
def test_new_tokens_see_their_prefix_and_themselves(config: Config, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    ragged = [(1, 1), (16, 16), (0, 7), (17, 49), (1, 33), (0, 0), (5, 35), (20, 34)]
    assert Batch(ragged, dtype, device, page_size=page_size).error(config) < tolerance(dtype)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 64), (3, 1, 16), (6, 2, 32), (4, 4, 16), (2, 1, 256)])
def test_heads_share_keys_in_groups(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(20, 20), (3, 18)], dtype, device, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert batch.error(SMALL) < tolerance(dtype)


@pytest.mark.parametrize("length", [3, 16, 35])
def test_what_stands_behind_a_sequence_is_never_met(length: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(3, length)], dtype, device, page_size=64)
    assert batch.cache.isnan().any()
    beside_nan = batch.run(TALL)[:3]
    batch.cache.nan_to_num_(0.0)
    assert torch.isfinite(beside_nan).all() and torch.equal(batch.run(TALL)[:3], beside_nan)


def test_a_sequence_gives_the_same_bits_in_any_batch(dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(7, 20), (21, 37), (4, 4)], dtype, device)
    together = batch.run(SMALL)[7:28]
    batch.q, batch.page_table, batch.seq_lens = batch.q[7:28], batch.page_table[1:2], batch.seq_lens[1:2]
    batch.cu_q = batch.cu_q.new_tensor([0, 21])
    assert torch.equal(batch.run(SMALL), together)


def test_rows_of_padding_are_left_alone(device: torch.device) -> None:
    batch = Batch([(9, 9), (4, 12)], torch.float16, device)
    out = torch.full((16, 4, 16), 7.0, dtype=torch.float16, device=device)
    assert batch.run(SMALL, out) is out
    assert torch.isfinite(out).all() and bool((out[13:] == 7).all())


def test_impossible_shapes_are_refused(device: torch.device) -> None:
    batch = Batch([(4, 4)], torch.float16, device)
    for page_size, heads in ((24, 4), (16, 3)):
        with pytest.raises(ValueError, match="gqa_prefill"):
            gqa_prefill(batch.q[:, :heads], batch.cache, batch.page_table, batch.cu_q, batch.seq_lens, 4, SCALE, page_size)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*module.CONFIGS.values()], ids=lambda config: f"{config.block_m}x{config.block_n}")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_real_sizes(config: Config, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    lens = [(1000, 1000), (128, 700), (1, 513), (65, 65), (300, 1324)]
    batch = Batch(lens, dtype, device, num_heads=32, num_kv_heads=8, head_dim=head_dim, page_size=64)
    assert batch.error(config) < tolerance(dtype)
