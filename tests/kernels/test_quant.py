"""Rows and weights in e4m3: the kernels give the reference's numbers, which stand close to what was quantized."""

import pytest
import torch
from torch import Tensor

from kernels import quant
from kernels.block_fp8 import BlockFp8, quantize
from kernels.quant import Config, Quantized, quantize_rows, quantize_rows_reference, silu_mul_quant, silu_mul_quant_reference


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.randn(*shape[:-1], 1, generator=generator).mul(3).exp()


def dequantized(rows: Quantized) -> Tensor:
    return (rows.data.float().unflatten(-1, (-1, 128)) * rows.scale.unsqueeze(-1)).flatten(-2)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(1, 1), (7, 5), (67, 2)])
def test_rows_are_rounded_as_the_reference_rounds_them(device: torch.device, dtype: torch.dtype, num_rows: int, num_groups: int,
                                                       column_major: bool) -> None:
    x = randn(num_rows, num_groups * 128).clamp(-60000, 60000).to(device, dtype)
    out, expected = quantize_rows(x, column_major=column_major), quantize_rows_reference(x)
    assert torch.equal(out.data.float(), expected.data.float()) and torch.equal(out.scale, expected.scale)
    assert out.scale.stride(0 if column_major else 1) == 1
    assert relative_error(dequantized(out), x) < 0.04


def test_zeros_stay_zeros(device: torch.device) -> None:
    out = quantize_rows(torch.zeros(3, 256, device=device))
    assert (dequantized(out) == 0).all()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    x = randn(4, 256).to(device)
    x[2, :100] = 1e30
    assert torch.equal(quantize_rows(x).data[3].float(), quantize_rows(x[3:]).data[0].float())


def test_padding_rows_are_room_and_nothing_else(device: torch.device) -> None:
    x = randn(5, 256).to(device)
    out = quantize_rows(x, row_multiple=16)
    assert out.data.shape == (16, 256) and out.scale.shape == (16, 2) and out.scale.stride() == (1, 16)
    assert torch.equal(dequantized(Quantized(out.data[:5], out.scale[:5])), dequantized(quantize_rows(x)))


def test_rows_may_be_a_part_of_wider_ones(device: torch.device) -> None:
    wide = randn(6, 512).to(device)
    part = wide[:, 128:384]
    assert torch.equal(dequantized(quantize_rows(part)), dequantized(quantize_rows(part.contiguous())))


def test_no_rows_and_ragged_groups(device: torch.device) -> None:
    assert quantize_rows(torch.empty(0, 256, device=device)).data.shape == (0, 256)
    with pytest.raises(ValueError, match="groups of 128"):
        quantize_rows(torch.empty(2, 200, device=device))


@pytest.mark.parametrize("config", [None, Config(block_t=4, block_g=1, num_warps=4)])
def test_swiglu_is_taken_in_float32_and_rounded_once(device: torch.device, dtype: torch.dtype, config: Config | None) -> None:
    gate_up = randn(9, 2 * 384, seed=1).clamp(-9, 9).to(device, dtype)
    out, expected = silu_mul_quant(gate_up, config=config), silu_mul_quant_reference(gate_up)
    assert relative_error(dequantized(out), dequantized(expected)) < 2e-3  # a tie may fall to the other side
    assert relative_error(out.scale, expected.scale) < 1e-5


def test_weights_come_back_nearly_as_they_were() -> None:
    weight = randn(3, 200, 300)
    quantized = quantize(weight)
    assert quantized.scale.shape == (3, 2, 3) and quantized.shape == weight.shape
    assert relative_error(quantized.dequantized(torch.float32), weight) < 0.04
    assert quantized.data.float().abs().amax() == 448


def test_rows_of_a_weight_change_places_only_within_their_block() -> None:
    weight = quantize(randn(256, 128))
    order = torch.cat((torch.arange(128).flip(0), torch.arange(128, 256)))
    assert torch.equal(weight.with_rows(order).dequantized(torch.float32), weight.dequantized(torch.float32)[order])
    with pytest.raises(ValueError, match="within blocks"):
        weight.with_rows(torch.arange(256).flip(0))


def test_scales_must_cover_the_weight() -> None:
    with pytest.raises(ValueError, match="do not cover"):
        BlockFp8(torch.empty(256, 128, dtype=torch.float8_e4m3fn), torch.empty(1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 65, 5000])
def test_real_sizes_have_the_same_bits_as_the_reference(device: torch.device, dtype: torch.dtype, num_rows: int) -> None:
    x = randn(num_rows, 7168).clamp(-60000, 60000).to(device, dtype)
    out, expected = quantize_rows(x), quantize_rows_reference(x)
    assert torch.equal(out.data.float(), expected.data.float()) and torch.equal(out.scale, expected.scale)


def test_the_table_has_a_config_for_every_number_of_rows() -> None:
    assert all(quant.config_for(rows) for rows in (1, 64, 65, 1 << 20))
