"""The grouped products of a mixture of experts against one row after another in float32."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.align import align
from kernels.experts import Config, Tile, config_for, experts, experts_reference, pack_gate_up


def same_tiles(block_m: int, tile: Tile) -> Config:
    return Config(block_m=block_m, gate_up=tile, down=tile)


TILE = Tile(block_n=64, block_k=32, num_warps=4, num_stages=3)
NARROW = same_tiles(16, replace(TILE, block_n=32))
BULK = same_tiles(64, replace(TILE, uses_tma=True, group_m=2))
CONFIGS = {"narrow": NARROW, "swapped": same_tiles(16, replace(TILE, is_swapped=True)), "bulk": BULK,
           "swapped bulk": same_tiles(16, replace(TILE, is_swapped=True, uses_tma=True))}
HIDDEN, INNER = 96, 64


def persistent(config: Config) -> Config:
    return replace(config, gate_up=replace(config.gate_up, is_persistent=True), down=replace(config.down, is_persistent=True))


class Case:
    """Random experts, one of them never chosen and full of NaN; the last `num_padding` tokens are padding, and NaN too."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, num_padding: int = 0, num_experts: int = 5,
                 top_k: int = 3, hidden: int = HIDDEN, inner: int = INNER, num_shared: int = 0) -> None:
        generator = torch.Generator().manual_seed(num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        total = num_experts + num_shared
        self.x = normal(num_tokens, hidden).to(device, dtype)
        self.gate_up = (normal(total, 2 * inner, hidden) * hidden**-0.5).to(device, dtype)
        self.down = (normal(total, hidden, inner) * inner**-0.5).to(device, dtype)
        ids = normal(num_tokens, num_experts - 1).argsort(1)[:, :top_k] + 1   # never expert 0
        shared = torch.arange(num_experts, total).expand(num_tokens, -1)
        self.ids = torch.cat((ids, shared), 1).int().to(device)
        self.weights = torch.rand(self.ids.shape, generator=generator).to(device)
        self.gate_up[0] = self.down[0] = float("nan")
        if num_padding:
            self.ids[-num_padding:] = -1
            self.x[-num_padding:] = self.weights[-num_padding:] = float("nan")

    def run(self, config: Config) -> Tensor:
        return experts(self.x, pack_gate_up(self.gate_up), self.down, self.ids, self.weights, config=config)

    def error(self, out: Tensor) -> float:
        expected = experts_reference(self.x, self.gate_up, self.down, self.ids, self.weights)
        return float((out.float() - expected).norm() / expected.norm().clamp_min(1e-9))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_every_row_is_its_expert_times_its_weight(device: torch.device, dtype: torch.dtype, name: str, num_tokens: int) -> None:
    case = Case(num_tokens, device, dtype)
    assert case.error(case.run(CONFIGS[name])) < tolerance(dtype)


@pytest.mark.parametrize("name", ["narrow", "bulk"])
def test_experts_with_many_rows_fill_many_blocks(device: torch.device, name: str) -> None:
    case = Case(90, device, torch.float16, num_experts=3, top_k=2)
    assert case.error(case.run(CONFIGS[name])) < tolerance(torch.float16)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_gives_zeros_and_its_content_never_matters(device: torch.device, name: str) -> None:
    case = Case(9, device, torch.float16, num_padding=4)
    out = case.run(CONFIGS[name])
    assert (out[5:] == 0).all()
    assert case.error(out) < tolerance(torch.float16)
    case.ids[:] = -1
    assert (case.run(CONFIGS[name]) == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_need_not_be_multiples_of_the_tiles(device: torch.device, name: str) -> None:
    case = Case(5, device, torch.float16, hidden=72, inner=40, num_shared=1)
    assert case.error(case.run(CONFIGS[name])) < tolerance(torch.float16)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bits_alone_and_in_a_batch(device: torch.device, name: str) -> None:
    case = Case(12, device, torch.float16)
    together = case.run(CONFIGS[name])
    case.x, case.ids, case.weights = case.x[7:8], case.ids[7:8], case.weights[7:8]
    assert torch.equal(case.run(CONFIGS[name])[0], together[7])


def test_rows_sorted_beforehand_are_used(device: torch.device) -> None:
    case = Case(4, device, torch.float16)
    packed = pack_gate_up(case.gate_up)
    aligned = align(case.ids, 5, 16)
    out = experts(case.x, packed, case.down, case.ids, case.weights, aligned=aligned, config=NARROW)
    assert torch.equal(out, case.run(NARROW))
    with pytest.raises(ValueError, match="sorted in blocks of 16"):
        experts(case.x, packed, case.down, case.ids, case.weights, aligned=aligned, config=BULK)


def test_weights_that_do_not_fit_are_refused(device: torch.device) -> None:
    case = Case(2, device, torch.float16)
    with pytest.raises(ValueError, match="do not fit"):
        experts(case.x[:, :64], case.gate_up, case.down, case.ids, case.weights)


def test_no_tokens_give_nothing(device: torch.device) -> None:
    case = Case(0, device, torch.float16)
    assert case.run(NARROW).shape == (0, 3, HIDDEN)


def test_packing_puts_each_gate_row_before_its_up_row() -> None:
    gate_up = torch.arange(2 * 6 * 1).view(2, 6, 1)
    assert pack_gate_up(gate_up).flatten(1).tolist() == [[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]


def test_the_table_has_a_config_for_every_step() -> None:
    for hidden, inner in ((2048, 1408), (7168, 2048), (64, 32)):
        blocks = [config_for(num_tokens, hidden, inner).block_m for num_tokens in (1, 4, 16, 64, 128, 256, 512, 1024, 4096, 32768)]
        assert blocks == sorted(blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["narrow", "bulk"])
def test_a_persistent_grid_gives_the_same_bits(device: torch.device, dtype: torch.dtype, name: str) -> None:
    case = Case(300, device, dtype, num_padding=20)
    assert torch.equal(case.run(persistent(CONFIGS[name])), case.run(CONFIGS[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 128, 256, 512, 1000])
def test_the_configs_of_the_table_are_right_on_real_sizes(device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    case = Case(num_tokens, device, dtype, num_padding=num_tokens // 10, num_experts=64, top_k=6, hidden=2048, inner=1408, num_shared=2)
    assert case.error(case.run(config_for(num_tokens, 2048, 1408))) < tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_an_overlapping_launch_gives_the_same_bits(device: torch.device, num_tokens: int) -> None:
    case = Case(num_tokens, device, torch.bfloat16, num_experts=64, top_k=6, hidden=2048, inner=1408)
    config = config_for(num_tokens, 2048, 1408)
    alone = case.run(replace(config, prefetches=False))
    for _ in range(20):
        assert torch.equal(case.run(replace(config, prefetches=True)), alone)
