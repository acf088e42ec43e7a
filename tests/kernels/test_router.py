"""The router's logits, in parts, against plain torch."""

import pytest
import torch

from kernels.router import Config, config_for, router, router_reference

CONFIGS = {
    "one tile a program": Config(block_t=16, block_e=16, block_k=32, num_warps=1),
    "several tiles": Config(block_t=32, block_e=32, block_k=16, num_warps=4, num_tiles=3, num_stages=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "depth"), [(1, 64, 96), (5, 24, 72), (33, 16, 128), (0, 16, 64)])
def test_the_parts_add_up_to_the_product(device: torch.device, dtype: torch.dtype, config: Config, num_tokens: int, num_experts: int,
                                         depth: int) -> None:
    torch.manual_seed(depth)
    padded = torch.full((num_tokens, depth + 8), float("nan"), dtype=dtype, device=device)   # rows are strided
    x = padded[:, :depth].copy_(torch.randn(num_tokens, depth))
    gate = (torch.randn(num_experts, depth) * 0.1).to(device, dtype)
    parts = router(x, gate, config=config)
    assert parts.shape == (-(-depth // (config.block_k * config.num_tiles)), num_tokens, num_experts)
    torch.testing.assert_close(parts.sum(0), router_reference(x, gate), rtol=1e-4, atol=1e-4)


def test_a_row_is_the_same_bits_alone_and_in_a_batch(device: torch.device) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(7, 64, device=device, dtype=torch.float16), torch.randn(16, 64, device=device, dtype=torch.float16)
    config = CONFIGS["one tile a program"]
    together = router(x, gate, config=config)
    x[:4] = float("nan")
    x[5:] = float("nan")
    assert torch.equal(router(x, gate, config=config)[:, 4], together[:, 4])
    assert torch.equal(router(x[4:5], gate, config=config)[:, 0], together[:, 4])


@pytest.mark.parametrize(("num_experts", "hidden_size"), [(64, 2048), (256, 7168), (160, 5120)])
def test_every_step_and_model_has_a_config_that_covers_the_depth(num_experts: int, hidden_size: int) -> None:
    for num_tokens in (1, 16, 17, 64, 65, 256):
        config = config_for(num_tokens, num_experts, hidden_size)
        assert -(-hidden_size // (config.block_k * config.num_tiles)) <= 32   # parts that the router's reader adds up


def test_a_gate_of_another_width_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        router(torch.zeros(2, 32), torch.zeros(4, 48))
    with pytest.raises(ValueError, match="do not fit"):
        router(torch.zeros(2, 32), torch.zeros(4, 32, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "depth"), [(64, 2048), (256, 7168)])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 256])
def test_real_routers_match_the_reference(device: torch.device, num_experts: int, depth: int, num_tokens: int) -> None:
    x = torch.randn(num_tokens, depth, device=device, dtype=torch.bfloat16)
    gate = (torch.randn(num_experts, depth, device=device) * 0.02).bfloat16()
    torch.testing.assert_close(router(x, gate).sum(0), router_reference(x, gate), rtol=1e-3, atol=1e-3)
