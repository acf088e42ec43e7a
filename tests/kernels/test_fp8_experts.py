"""The grouped products of a mixture of fp8 experts against one expert after another in float32, rounded at the same places."""

import pytest
import torch
from torch import Tensor

from kernels.align import align
from kernels.block_fp8 import quantize
from kernels.fp8_experts import CONFIGS as TABLE
from kernels.fp8_experts import Config, Tile, config_for, fp8_experts, fp8_experts_reference

# The interpreter's numpy warns when a whole column is NaN: slots without a row hold anything, here NaN.
pytestmark = [pytest.mark.filterwarnings("ignore:All-NaN"), pytest.mark.filterwarnings("ignore:invalid value")]

TILE = Tile(num_warps=4, num_stages=3)
BULK = Tile(num_warps=4, num_stages=3, group_m=2, uses_tma=True)
CONFIGS = {
    "narrow": Config(block_m=16, gate_up=TILE, down=Tile(num_warps=4, num_stages=3, block_n=64)),
    "halves": Config(block_m=16, gate_up=TILE, down=Tile(num_warps=4, num_stages=3, block_n=256)),
    "bulk": Config(block_m=32, gate_up=BULK, down=Tile(num_warps=4, num_stages=3, block_n=256, group_m=2, uses_tma=True)),
}
HIDDEN, INNER = 384, 128


class Case:
    """Random experts, one of them never chosen and full of NaN; the last `num_padding` tokens are padding, and NaN too."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, num_padding: int = 0, num_experts: int = 5,
                 top_k: int = 3, hidden: int = HIDDEN, inner: int = INNER) -> None:
        generator = torch.Generator(device).manual_seed(num_tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.x = normal(num_tokens, hidden).to(dtype)
        self.gate_up = quantize(normal(num_experts, 2 * inner, hidden) * hidden**-0.5)
        self.down = quantize(normal(num_experts, hidden, inner) * inner**-0.5)
        self.ids = (normal(num_tokens, num_experts - 1).argsort(1)[:, :top_k] + 1).int().contiguous()   # never expert 0
        self.weights = torch.rand(self.ids.shape, generator=generator, device=device)
        self.gate_up.scale[0] = self.down.scale[0] = float("nan")
        if num_padding:
            self.ids[-num_padding:] = -1
            self.x[-num_padding:] = self.weights[-num_padding:] = float("nan")

    def run(self, config: Config) -> Tensor:
        return fp8_experts(self.x, self.gate_up, self.down, self.ids, self.weights, config=config)

    def error(self, out: Tensor) -> float:
        expected = fp8_experts_reference(self.x, self.gate_up, self.down, self.ids, self.weights)
        return float((out.float() - expected).norm() / expected.norm().clamp_min(1e-9))


def tolerance(dtype: torch.dtype) -> float:
    """Between the products a sum that differs in its last bits may be rounded to the next e4m3 number, 6 to 12 % away: some are."""
    return {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 1.5e-2}[dtype]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_every_row_is_its_expert_times_its_weight(device: torch.device, dtype: torch.dtype, name: str, num_tokens: int) -> None:
    case = Case(num_tokens, device, dtype)
    out = case.run(CONFIGS[name])
    assert out.shape == (num_tokens, 3, HIDDEN) and out.dtype == dtype and case.error(out) < tolerance(dtype)


def test_experts_with_many_rows_fill_many_blocks(device: torch.device) -> None:
    case = Case(60, device, torch.float16, num_experts=3, top_k=2)
    assert case.error(case.run(CONFIGS["bulk"])) < tolerance(torch.float16)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_gives_zeros_and_its_content_never_matters(device: torch.device, name: str) -> None:
    case = Case(9, device, torch.float16, num_padding=4)
    out = case.run(CONFIGS[name])
    assert (out[5:] == 0).all() and case.error(out) < tolerance(torch.float16)
    case.ids[:] = -1
    assert (case.run(CONFIGS[name]) == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bits_alone_and_in_a_batch(device: torch.device, name: str) -> None:
    case = Case(12, device, torch.float16)
    together = case.run(CONFIGS[name])
    case.x, case.ids, case.weights = case.x[7:8], case.ids[7:8], case.weights[7:8]
    assert torch.equal(case.run(CONFIGS[name])[0], together[7])


def test_rows_sorted_beforehand_are_used(device: torch.device) -> None:
    case = Case(4, device, torch.float16)
    aligned = align(case.ids, 5, 16)
    narrow, bulk = CONFIGS["narrow"], CONFIGS["bulk"]
    out = fp8_experts(case.x, case.gate_up, case.down, case.ids, case.weights, aligned=aligned, config=narrow)
    assert torch.equal(out, case.run(narrow))
    with pytest.raises(ValueError, match="sorted in blocks of 16"):
        fp8_experts(case.x, case.gate_up, case.down, case.ids, case.weights, aligned=aligned, config=bulk)


def test_weights_that_do_not_fit_are_refused(device: torch.device) -> None:
    case = Case(2, device, torch.float16)
    with pytest.raises(ValueError, match="not fit"):
        fp8_experts(case.x[:, :256], case.gate_up, case.down, case.ids, case.weights)


def test_no_tokens_give_nothing(device: torch.device) -> None:
    case = Case(0, device, torch.float16)
    assert fp8_experts(case.x, case.gate_up, case.down, case.ids, case.weights).shape == (0, 3, HIDDEN)


def test_the_table_has_a_config_for_every_step() -> None:
    blocks = [config_for(num_tokens * 8, 256).block_m for num_tokens in (1, 16, 64, 128, 256, 512, 1024, 4096, 32768)]
    assert blocks == sorted(blocks) and blocks[-1] == TABLE[-1][1].block_m


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1000])
def test_the_configs_of_the_table_are_right_on_real_sizes(device: torch.device, num_tokens: int) -> None:
    case = Case(num_tokens, device, torch.bfloat16, num_padding=num_tokens // 10, num_experts=16, top_k=8, hidden=7168, inner=2048)
    out = case.run(config_for(case.ids.numel(), 16))
    assert case.error(out) < tolerance(torch.bfloat16)
    assert torch.equal(case.run(config_for(case.ids.numel(), 16)), out)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [config for _, config in TABLE])
def test_every_config_of_the_table_is_right(device: torch.device, config: Config) -> None:
    case = Case(200, device, torch.bfloat16, num_padding=3, num_experts=9, top_k=4, hidden=1024, inner=512)
    assert case.error(case.run(config)) < tolerance(torch.bfloat16)
