"""Rotation and store: what lands in the cache, what is rotated in place, and that padding rows leave no trace."""

import pytest
import torch

from kernels import gqa_store, mla_store
from kernels.gqa_store import gqa_rope_store, gqa_rope_store_reference
from kernels.mla_store import mla_norm_rope_store, mla_norm_rope_store_reference

EPS = 1e-6
NUM_SLOTS = 64
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Also equal in where nothing (NaN) was written."""
    assert torch.equal(out.isnan(), expected.isnan())
    difference = (out.float() - expected.float()).nan_to_num().norm()
    assert difference <= BOUND[out.dtype] * expected.float().nan_to_num().norm()


def rotation_table(device: torch.device, max_position: int, dim: int) -> torch.Tensor:
    angles = torch.arange(max_position).unsqueeze(1) / 100.0 ** (torch.arange(dim // 2) / dim)
    return torch.stack((angles.cos(), angles.sin()), -1).to(device)


def places(device: torch.device, num_tokens: int, padding: tuple[int, ...], num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and distinct slots of tokens, some of which are padding rows."""
    positions, slots = torch.randint(0, 50, (num_tokens,)), torch.randperm(num_slots)[:num_tokens]
    positions[list(padding)], slots[list(padding)] = 0, -1
    return positions.to(device), slots.to(device)


def mla_case(device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, nope: int, rope: int, rank: int,
             padding: tuple[int, ...] = (), num_slots: int = NUM_SLOTS) -> list[torch.Tensor]:
    """The arguments of mla_norm_rope_store but eps, as one product makes them: q and latent are parts of its rows."""
    q_width = num_heads * (nope + rope)
    product = torch.randn(num_tokens, q_width + rank + rope).to(device, dtype)
    q, latent = product.tensor_split((q_width,), -1)
    cache = torch.full((num_slots, rank + rope), float("nan"), dtype=dtype, device=device)
    weight = torch.randn(rank).to(device, dtype)
    return [torch.unflatten(q, 1, (num_heads, -1)), latent, weight, rotation_table(device, 50, rope),
            *places(device, num_tokens, padding, num_slots), cache]


def check_mla(case: list[torch.Tensor], config: mla_store.Config | None = None) -> None:
    q, latent, weight, rotations, positions, slots, cache = case
    expected_q, expected_cache, latent_before = q.float(), cache.float(), latent.clone()
    mla_norm_rope_store_reference(expected_q, latent.float(), weight.float(), EPS, rotations, positions, slots, expected_cache)
    nope_before = q[..., : q.shape[2] - 2 * rotations.shape[1]].clone()
    mla_norm_rope_store(q, latent, weight, EPS, rotations, positions, slots, cache, config=config)
    assert_close(cache, expected_cache)
    assert_close(q, expected_q)
    assert torch.equal(latent, latent_before) and torch.equal(q[..., : nope_before.shape[2]], nope_before)


@pytest.mark.parametrize(("num_tokens", "num_heads", "nope", "rope", "rank"), [(1, 2, 8, 4, 16), (5, 3, 16, 8, 32), (2, 20, 4, 64, 512)])
def test_the_latent_is_normed_rotated_and_stored_and_the_queries_rotated(device: torch.device, dtype: torch.dtype, num_tokens: int,
                                                                         num_heads: int, nope: int, rope: int, rank: int) -> None:
    check_mla(mla_case(device, dtype, num_tokens, num_heads, nope, rope, rank))


@pytest.mark.parametrize("block_h", [1, 2, 8])
def test_heads_in_blocks_of_any_size_give_the_same(device: torch.device, dtype: torch.dtype, block_h: int) -> None:
    check_mla(mla_case(device, dtype, 3, 5, 8, 8, 16), mla_store.Config(block_h=block_h, num_warps=1))


def test_padding_rows_store_no_latent(device: torch.device, dtype: torch.dtype) -> None:
    case = mla_case(device, dtype, 4, 2, 8, 8, 16, padding=(1, 3))
    check_mla(case)
    assert case[-1].isnan().all(1).sum() == NUM_SLOTS - 2


def test_a_tokens_latent_does_not_depend_on_its_mates(device: torch.device, dtype: torch.dtype) -> None:
    case = mla_case(device, dtype, 4, 2, 8, 8, 16)
    q, latent, weight, rotations, positions, slots, cache = case
    latent[[0, 2, 3]], q[[0, 2, 3]] = float("nan"), float("nan")
    alone = [q[1:2].clone(), latent[1:2].clone(), weight, rotations, positions[1:2], slots[1:2], cache.clone()]
    for each in (case, alone):
        mla_norm_rope_store(*each[:3], EPS, *each[3:])
    assert torch.equal(q[1:2], alone[0]) and torch.equal(cache[slots[1]], alone[6][slots[1]])


def gqa_case(device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, num_kv: int, dim: int,
             padding: tuple[int, ...] = (), num_slots: int = NUM_SLOTS) -> tuple[torch.Tensor, ...]:
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv, dim).to(device, dtype)
    cache = torch.full((2, num_slots, num_kv, dim), float("nan"), dtype=dtype, device=device)
    return heads, rotation_table(device, 50, dim), *places(device, num_tokens, padding, num_slots), cache


def check_gqa(case: tuple[torch.Tensor, ...], num_heads: int, config: gqa_store.Config | None = None) -> None:
    heads, rotations, positions, slots, cache = case
    expected, expected_cache, values = heads.float(), cache.float(), heads[:, -cache.shape[2] :].clone()
    gqa_rope_store_reference(expected, rotations, positions, slots, expected_cache, num_heads)
    gqa_rope_store(heads, rotations, positions, slots, cache, num_heads, config=config)
    assert_close(heads, expected)
    assert_close(cache, expected_cache)
    assert torch.equal(heads[:, -cache.shape[2] :], values)


@pytest.mark.parametrize(("num_tokens", "num_heads", "num_kv", "dim"), [(1, 2, 1, 16), (4, 9, 3, 64), (2, 6, 2, 80), (3, 4, 4, 8)])
def test_queries_and_keys_are_rotated_and_keys_and_values_stored(device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int,
                                                                 num_kv: int, dim: int) -> None:
    check_gqa(gqa_case(device, dtype, num_tokens, num_heads, num_kv, dim), num_heads)


@pytest.mark.parametrize("block_h", [1, 4, 16])
def test_a_block_may_hold_queries_keys_and_values(device: torch.device, dtype: torch.dtype, block_h: int) -> None:
    check_gqa(gqa_case(device, dtype, 2, 3, 2, 16), 3, gqa_store.Config(block_h=block_h, num_warps=1))


def test_padding_rows_store_no_keys_and_values(device: torch.device, dtype: torch.dtype) -> None:
    case = gqa_case(device, dtype, 3, 2, 1, 16, padding=(0, 2))
    check_gqa(case, 2)
    assert case[-1].isnan().flatten(2).all(2).sum() == 2 * (NUM_SLOTS - 1)


def test_no_tokens_are_no_work(device: torch.device, dtype: torch.dtype) -> None:
    check_mla(mla_case(device, dtype, 0, 2, 8, 8, 16))
    check_gqa(gqa_case(device, dtype, 0, 2, 1, 16), 2)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    q, latent, weight, rotations, positions, slots, cache = mla_case(device, torch.float32, 2, 2, 8, 8, 16)
    with pytest.raises(ValueError, match="mla_norm_rope_store"):
        mla_norm_rope_store(q, latent[:, 1:], weight, EPS, rotations, positions, slots, cache)
    heads, rotations, positions, slots, cache = gqa_case(device, torch.float32, 2, 2, 1, 16)
    with pytest.raises(ValueError, match="gqa_rope_store"):
        gqa_rope_store(heads, rotations, positions, slots, cache, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 16), (1, 128), (256, 16), (8192, 16), (4096, 128)])
def test_latents_at_sizes_of_real_use(device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int) -> None:
    check_mla(mla_case(device, dtype, num_tokens, num_heads, 128, 64, 512, padding=(num_tokens // 2,), num_slots=1 << 15))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_heads", "num_kv", "dim"),
                         [(1, 32, 8, 128), (256, 28, 4, 128), (8192, 32, 8, 128), (512, 9, 3, 64)])
def test_keys_and_values_at_sizes_of_real_use(device: torch.device, dtype: torch.dtype, num_tokens: int, num_heads: int, num_kv: int,
                                              dim: int) -> None:
    check_gqa(gqa_case(device, dtype, num_tokens, num_heads, num_kv, dim, padding=(num_tokens // 2,), num_slots=1 << 15), num_heads)
