"""Causal attention over decompressed keys and values, against the plain float32 computation of each sequence by itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import mla_prefill as module
from kernels.mla_prefill import Config, mla_prefill, mla_prefill_reference

SCALE = 0.2
SMALL = Config(block_m=16, block_n=16, heads_per_group=2, num_warps=4, num_stages=2)
WIDE = replace(SMALL, block_n=32)
TALL = replace(SMALL, block_m=32)


class Batch:
    """Sequences as (new tokens, all tokens), with `padding` rows of NaN behind the last."""

    def __init__(self, lens: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, *, num_heads: int = 2, nope: int = 32,
                 rope: int = 16, v_dim: int = 16, padding: int = 5) -> None:
        generator = torch.Generator().manual_seed(len(lens) + num_heads)
        num_queries, num_keys = (sum(column) for column in zip(*lens, strict=True))

        def rows(count: int, *shape: int) -> Tensor:
            values = torch.randn(count + padding, *shape, generator=generator)
            values[count:] = float("nan")
            return values.to(device, dtype)

        self.num_queries = num_queries
        self.q = rows(num_queries, num_heads + 1, nope + rope)[:, 1:]          # strided, as a part of a wider product is
        self.kv = rows(num_keys, num_heads, nope + v_dim)
        self.k_rope = rows(num_keys, 48 + rope)[:, 48:]                        # the last columns of a latent row
        self.cu_q, self.cu_k = (torch.tensor([0, *column], device=device).cumsum(0).int() for column in zip(*lens, strict=True))
        self.max_q = max(new for new, _ in lens)

    def run(self, config: Config | None = None, out: Tensor | None = None) -> Tensor:
        return mla_prefill(self.q, self.kv, self.k_rope, self.cu_q, self.cu_k, self.max_q, SCALE, out, config)

    def expected(self) -> Tensor:
        return mla_prefill_reference(self.q, self.kv, self.k_rope, self.cu_q, self.cu_k, SCALE)[: self.num_queries]

    def error(self, config: Config | None = None) -> float:
        expected = self.expected()
        return float((self.run(config)[: self.num_queries].float() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("config", [SMALL, WIDE, TALL], ids=["square", "wide", "tall"])
def test_new_tokens_see_their_prefix_and_themselves(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    ragged = [(1, 1), (16, 16), (0, 7), (17, 49), (1, 33), (40, 40), (0, 0), (5, 35), (20, 34)]
    assert Batch(ragged, dtype, device).error(config) < tolerance(dtype)


@pytest.mark.parametrize(("nope", "rope", "v_dim"), [(16, 16, 32), (32, 16, 32)])
def test_key_and_value_dimensions_are_independent(nope: int, rope: int, v_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(20, 20), (3, 18)], dtype, device, nope=nope, rope=rope, v_dim=v_dim)
    assert batch.error(SMALL) < tolerance(dtype)


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_heads_are_grouped_by_what_divides_them(num_heads: int, device: torch.device) -> None:
    batch = Batch([(18, 20)], torch.float16, device, num_heads=num_heads)
    assert batch.error(SMALL) < tolerance(torch.float16)


@pytest.mark.parametrize("length", [3, 16, 35])
def test_what_stands_behind_a_sequence_is_never_met(length: int, dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(3, length)], dtype, device, padding=40)
    assert batch.kv[length:].isnan().all()
    beside_nan = batch.run(WIDE)[:3]
    batch.kv[length:], batch.k_rope[length:] = 0, 0
    assert torch.isfinite(beside_nan).all() and torch.equal(batch.run(WIDE)[:3], beside_nan)


def test_a_sequence_gives_the_same_bits_in_any_batch(dtype: torch.dtype, device: torch.device) -> None:
    batch = Batch([(7, 20), (21, 37), (4, 4)], dtype, device)
    together = batch.run(SMALL)[7:28]
    batch.q, batch.kv, batch.k_rope = batch.q[7:28], batch.kv[20:57], batch.k_rope[20:57]
    batch.cu_q, batch.cu_k = batch.cu_q.new_tensor([0, 21]), batch.cu_k.new_tensor([0, 37])
    assert torch.equal(batch.run(SMALL), together)


def test_chunks_continue_what_the_chunk_before_began(device: torch.device) -> None:
    whole = Batch([(40, 40)], torch.float16, device, padding=0)
    at_once = whole.run(SMALL).float()
    whole.q, whole.cu_q = whole.q[24:], whole.cu_q.new_tensor([0, 16])
    assert (whole.run(SMALL).float() - at_once[24:]).norm() < 2e-3 * at_once[24:].norm()


def test_rows_of_padding_are_left_alone(device: torch.device) -> None:
    batch = Batch([(9, 9), (4, 12)], torch.float16, device)
    out = torch.full((18, 2, 16), 7.0, dtype=torch.float16, device=device)
    assert batch.run(SMALL, out) is out
    assert torch.isfinite(out).all() and bool((out[13:] == 7).all())


def test_more_sequences_than_one_step_of_the_search_looks_at(device: torch.device) -> None:
    lens = [(0, 0)] * 260 + [(1, 2), (3, 3)]
    assert Batch(lens, torch.float16, device, num_heads=1, nope=16).error(replace(SMALL, heads_per_group=1)) < 2e-3


def test_nothing_to_do_launches_nothing(device: torch.device) -> None:
    batch = Batch([(0, 0)], torch.float16, device, padding=0)
    assert batch.run().shape == (0, 2, 16)


def test_impossible_shapes_are_refused(device: torch.device) -> None:
    batch = Batch([(4, 4)], torch.float16, device, nope=32, rope=16, v_dim=16)
    with pytest.raises(ValueError, match="mla_prefill"):
        mla_prefill(batch.q, batch.kv[..., :-1].contiguous(), batch.k_rope, batch.cu_q, batch.cu_k, 4, SCALE)
    with pytest.raises(ValueError, match="mla_prefill"):
        mla_prefill(batch.q, batch.kv, batch.k_rope, batch.cu_q, batch.cu_k, 4, -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*module.CONFIGS.values()], ids=lambda config: f"{config.block_m}x{config.block_n}")
@pytest.mark.parametrize("num_heads", [16, 128])
def test_real_sizes(config: Config, num_heads: int, dtype: torch.dtype, device: torch.device) -> None:
    lens = [(1000, 1000), (128, 700), (1, 513), (65, 65), (300, 1324)]
    batch = Batch(lens, dtype, device, num_heads=num_heads, nope=128, rope=64, v_dim=128)
    assert batch.error(config) < tolerance(dtype)
