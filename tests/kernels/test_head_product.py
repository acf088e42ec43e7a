"""Each head's own product against plain torch, with weights as latent attention has them: strided, and read from either side."""

import pytest
import torch
from torch import Tensor

from kernels.head_product import Config, head_product, head_product_reference

SMALL = Config(block_n=16, num_warps=1)


def inputs(num_tokens: int, dtype: torch.dtype, device: torch.device, *, is_transposed: bool) -> tuple[Tensor, Tensor]:
    """x [T, 3, 24 or 40] cut from wider heads, and weights [3, 24, 40] or [3, 40, 24] cut from [3, 64, 40]."""
    torch.manual_seed(num_tokens)
    kv_b = torch.randn(3, 64, 40).to(device, dtype)
    weight = kv_b[:, 24:48].transpose(1, 2) if is_transposed else kv_b[:, :24]
    padded = torch.full((num_tokens, 3, 48), float("nan"), dtype=dtype, device=device)
    x = padded[..., : weight.shape[1]]
    return x.copy_(torch.randn(x.shape)), weight


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
@pytest.mark.parametrize("config", [None, SMALL])
def test_products_are_those_of_the_reference(device: torch.device, dtype: torch.dtype, is_transposed: bool, num_tokens: int,
                                             config: Config | None) -> None:
    x, weight = inputs(num_tokens, dtype, device, is_transposed=is_transposed)
    expected = head_product_reference(x, weight)
    out = head_product(x, weight, config=config)
    assert out.dtype == dtype and out.is_contiguous()
    assert (out.float() - expected).norm() <= 4e-3 * expected.norm()


def test_a_row_is_the_same_bits_alone_and_in_a_batch(device: torch.device) -> None:
    x, weight = inputs(3, torch.float16, device, is_transposed=True)
    together = head_product(x, weight)
    x[0] = x[2] = float("nan")
    assert torch.equal(head_product(x, weight)[1], together[1])
    assert torch.equal(head_product(x[1:2], weight)[0], together[1])


def test_weights_of_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        head_product(torch.zeros(1, 2, 8), torch.zeros(3, 8, 4))
