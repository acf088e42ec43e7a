"""Products of few rows against plain torch, on either kind of cores."""

import pytest
import torch
from torch import Tensor

from kernels.skinny_linear import MOST_TOKENS, ROWS, TABLES, TILES, Config, config_for, skinny_linear, skinny_linear_reference

CONFIGS = {
    "rows": Config(block_n=2, num_warps=1),
    "tiles": Config(block_n=16, num_warps=2, block_k=32, num_stages=3),
}


def inputs(num_tokens: int, width: int, depth: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    padded = torch.full((num_tokens, depth + 8), float("nan"), dtype=dtype, device=device)   # rows are strided
    x = padded[:, :depth].copy_(torch.randn(num_tokens, depth))
    return x, (torch.randn(width, depth) * 0.1).to(device, dtype), torch.randn(width).to(device, dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("num_tokens", "width", "depth"), [(1, 32, 64), (3, 21, 72), (4, 2, 104), (8, 33, 40), (16, 48, 96), (0, 8, 32)])
def test_products_are_those_of_the_reference(device: torch.device, dtype: torch.dtype, config: Config, num_tokens: int, width: int,
                                             depth: int) -> None:
    x, weight, bias = inputs(num_tokens, width, depth, dtype, device)
    out = skinny_linear(x, weight, config=config)
    expected = skinny_linear_reference(x, weight)
    assert out.dtype == dtype and (out.float() - expected).norm() <= 4e-3 * expected.norm()
    wide = skinny_linear(x, weight, bias, out_dtype=torch.float32, config=config)
    torch.testing.assert_close(wide, skinny_linear_reference(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_row_is_the_same_bits_alone_and_in_a_batch(device: torch.device, config: Config) -> None:
    x, weight, _ = inputs(11, 32, 64, torch.float16, device)
    together = skinny_linear(x, weight, config=config)
    x[:5] = float("nan")
    x[6:] = float("nan")
    assert torch.equal(skinny_linear(x, weight, config=config)[5], together[5])
    assert torch.equal(skinny_linear(x[5:6], weight, config=config)[0], together[5])


def test_tables_cover_steps_in_ascending_order() -> None:
    for table in (((4, ROWS), (16, TILES)), *TABLES.values()):
        limits = [most for most, _ in table]
        assert limits == sorted(limits) and limits[-1] <= MOST_TOKENS
        assert config_for(1, table) is table[0][1] and config_for(limits[-1] + 1, table) is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        skinny_linear(torch.zeros(2, 32), torch.zeros(4, 48))
    with pytest.raises(ValueError, match="more than 16 rows"):
        skinny_linear(torch.zeros(17, 32), torch.zeros(4, 32))
    with pytest.raises(ValueError, match="no config for 2 rows"):
        skinny_linear(torch.zeros(2, 32), torch.zeros(4, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3648, 2048), (2048, 2048), (2048, 10944)])
def test_the_models_products_come_from_the_table_and_beyond_it_from_the_library(device: torch.device, shape: tuple[int, int],
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.cuda import make_head, make_linear

    monkeypatch.setitem(TABLES, shape, ((4, ROWS), (16, TILES)))
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02
    for num_tokens in (1, 3, 4, 5, 16, 17):
        x = torch.randn(num_tokens, shape[1], device=device, dtype=torch.bfloat16)
        expected = skinny_linear_reference(x, weight)
        assert (make_linear(weight, None)(x).float() - expected).norm() <= 4e-3 * expected.norm()
        torch.testing.assert_close(make_head(weight)(x), expected, rtol=1e-3, atol=1e-3)
