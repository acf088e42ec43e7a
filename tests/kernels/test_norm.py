"""Norms: equal to plain torch, row by row, and nothing but the rows asked for is touched."""

import pytest
import torch

from kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

EPS = 1e-6
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def make(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (5, 100), (3, 576), (2, 2048), (1, 7168)])
def test_a_norm_is_what_torch_says(device: torch.device, dtype: torch.dtype, rows: int, dim: int) -> None:
    x, weight = 3 * make(device, dtype, rows, dim), make(device, dtype, dim, seed=1)
    assert error(rms_norm(x, weight, EPS), rms_norm_reference(x.float(), weight.float(), EPS)) < BOUND[dtype]


def test_rows_may_be_strided_and_the_output_given(device: torch.device, dtype: torch.dtype) -> None:
    wide, weight = make(device, dtype, 6, 160), make(device, dtype, 96, seed=1)
    x = wide[:, 32:128]
    outputs = torch.full((6, 128), float("nan"), dtype=dtype, device=device)
    out = rms_norm(x, weight, EPS, out=outputs[:, 16:112])
    assert out.data_ptr() == outputs[:, 16:].data_ptr()
    assert error(out, rms_norm_reference(x.float(), weight.float(), EPS)) < BOUND[dtype]
    assert outputs[:, :16].isnan().all() and outputs[:, 112:].isnan().all()


def test_a_norm_in_place_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    x, weight = make(device, dtype, 4, 96), make(device, dtype, 96, seed=1)
    expected = rms_norm(x, weight, EPS)
    assert torch.equal(rms_norm(x, weight, EPS, out=x), expected)


@pytest.mark.parametrize("parts", [None, 1, 2, 6])
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (5, 100), (2, 2048)])
def test_the_residual_is_updated_and_its_rounded_value_normed(device: torch.device, dtype: torch.dtype, rows: int, dim: int,
                                                              parts: int | None) -> None:
    delta = make(device, dtype, rows, dim) if parts is None else make(device, dtype, rows, parts, dim)
    residual, weight = 2 * make(device, dtype, rows, dim, seed=1), make(device, dtype, dim, seed=2)
    expected_residual = residual.clone()
    expected = add_rms_norm_reference(delta, expected_residual, weight, EPS)
    out = add_rms_norm(delta, residual, weight, EPS)
    assert torch.equal(residual, expected_residual)  # the order of the sum is fixed, so are its bits
    assert error(out, expected) < BOUND[dtype]


def test_delta_and_residual_may_be_strided(device: torch.device, dtype: torch.dtype) -> None:
    delta, stream = make(device, dtype, 4, 3, 80)[:, :2, :64], make(device, dtype, 4, 96, seed=1)
    residual, weight, around = stream[:, 16:80], make(device, dtype, 64, seed=2), stream.clone()
    expected_residual = residual.clone()
    expected = add_rms_norm_reference(delta, expected_residual, weight, EPS)
    assert error(add_rms_norm(delta, residual, weight, EPS), expected) < BOUND[dtype]
    assert torch.equal(residual, expected_residual)
    assert torch.equal(stream[:, :16], around[:, :16]) and torch.equal(stream[:, 80:], around[:, 80:])


def test_a_row_does_not_depend_on_its_mates(device: torch.device, dtype: torch.dtype) -> None:
    delta, residual, weight = (make(device, dtype, *shape, seed=seed) for seed, shape in enumerate([(5, 3, 64), (5, 64), (64,)]))
    delta[[0, 1, 2, 4]] = float("nan")
    alone = residual[3:4].clone()
    assert torch.equal(add_rms_norm(delta, residual, weight, EPS)[3:4], add_rms_norm(delta[3:4].clone(), alone, weight, EPS))
    assert torch.equal(residual[3:4], alone)


def test_no_rows_are_no_work(device: torch.device, dtype: torch.dtype) -> None:
    empty, weight = make(device, dtype, 0, 64), make(device, dtype, 64)
    assert rms_norm(empty, weight, EPS).shape == (0, 64) == add_rms_norm(empty, empty.clone(), weight, EPS).shape


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x = torch.zeros(2, 64, device=device)
    with pytest.raises(ValueError, match="rms_norm"):
        rms_norm(x, x[0, :32], EPS)
    with pytest.raises(ValueError, match="rms_norm"):
        rms_norm(x.t(), x[0, :2], EPS)
    with pytest.raises(ValueError, match="delta"):
        add_rms_norm(x[:1], x, x[0], EPS)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "dim", "parts"), [(8192, 2048, 6), (8192, 7168, 8), (300, 4096, 1), (1000, 576, 1)])
def test_sizes_of_real_use(device: torch.device, dtype: torch.dtype, rows: int, dim: int, parts: int) -> None:
    delta, residual = make(device, dtype, rows, parts, dim), make(device, dtype, rows, dim, seed=1)
    weight = make(device, dtype, dim, seed=2)
    expected_residual = residual.clone()
    expected = add_rms_norm_reference(delta, expected_residual, weight, EPS)
    assert error(add_rms_norm(delta, residual, weight, EPS), expected) < BOUND[dtype]
    assert torch.equal(residual, expected_residual)
    assert error(rms_norm(residual, weight, EPS), rms_norm_reference(residual, weight, EPS)) < BOUND[dtype]
