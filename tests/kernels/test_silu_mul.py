"""silu(gate) * up: equal to plain torch, also where halves end inside of a block."""

import pytest
import torch

from kernels.reference import silu_mul as silu_mul_reference
from kernels.silu_mul import Config, silu_mul

BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def check(gate_up: torch.Tensor, config: Config | None = None) -> None:
    out, expected = silu_mul(gate_up, config=config), silu_mul_reference(gate_up.float())
    assert out.shape == expected.shape and out.dtype == gate_up.dtype
    assert (out.float() - expected).norm() <= BOUND[gate_up.dtype] * expected.norm()


@pytest.mark.parametrize(("rows", "inner"), [(0, 64), (1, 32), (3, 100), (2, 1408)])
def test_it_is_what_torch_says(device: torch.device, dtype: torch.dtype, rows: int, inner: int) -> None:
    check((4 * torch.randn(rows, 2 * inner)).to(device, dtype))


def test_blocks_of_any_size_give_the_same(device: torch.device, dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 200).to(device, dtype)
    for block in (16, 64, 256):
        check(gate_up, Config(block=block, num_warps=1))


def test_rows_may_be_strided_and_their_mates_do_not_matter(device: torch.device, dtype: torch.dtype) -> None:
    wide = torch.full((4, 96), float("nan")).to(device, dtype)
    wide[1, 16:80] = torch.randn(64).to(device, dtype)
    assert torch.equal(silu_mul(wide[:, 16:80])[1:2], silu_mul(wide[1:2, 16:80].clone()))


def test_large_gates_neither_overflow_nor_vanish(device: torch.device, dtype: torch.dtype) -> None:
    gate_up = torch.tensor([[80.0, -80.0, 0.0, 30.0, 2.0, 2.0, 2.0, 2.0]]).to(device, dtype)
    torch.testing.assert_close(silu_mul(gate_up).float().cpu(), torch.tensor([[160.0, 0.0, 0.0, 60.0]]), atol=1e-6, rtol=1e-6)


def test_an_odd_width_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="silu_mul"):
        silu_mul(torch.zeros(1, 3, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "inner"), [(1, 10944), (128, 2816), (8192, 10944), (70000, 256)])
def test_sizes_of_real_use(device: torch.device, dtype: torch.dtype, rows: int, inner: int) -> None:
    check(torch.randn(rows, 2 * inner, device=device).to(dtype))
