"""Products with block-scaled fp8 weights against the same rounding in float32."""

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels import fp8_linear as module
from kernels.block_fp8 import BlockFp8, quantize
from kernels.fp8_linear import (
    LIBRARY_ABOVE,
    Config,
    Fp8Linear,
    config_for,
    fp8_linear,
    fp8_linear_quantized,
    fp8_linear_reference,
    new_counters,
)
from kernels.quant import quantize_rows

PLAIN = Config(block_n=64, block_t=16, num_warps=4, num_stages=3)
CONFIGS = {
    "plain": PLAIN,
    "quantizing": dataclasses.replace(PLAIN, quantizes=True),
    "split": dataclasses.replace(PLAIN, splits=3),
    "wide": Config(block_n=128, block_t=32, num_warps=4, num_stages=3, group_t=2),
    "halves": Config(block_n=256, block_t=32, num_warps=4, num_stages=3, splits=2),
    "bulk": Config(block_n=256, block_t=16, num_warps=4, num_stages=3, splits=2, uses_tma=True),
    "bulk quantizing": Config(block_n=64, block_t=16, num_warps=4, num_stages=3, uses_tma=True, quantizes=True),
}
SHAPES = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))


def case(num_tokens: int, num_rows: int, num_columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, BlockFp8, Tensor]:
    generator = torch.Generator(device).manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scales = normal(1, num_columns // 128).exp().repeat_interleave(128, 1)  # blocks of very different sizes
    weight = quantize(normal(num_rows, num_columns) * scales * num_columns**-0.5)
    return normal(num_tokens, num_columns).to(dtype), weight, normal(num_rows).to(dtype)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 208), (19, 336)])
def test_a_product_is_that_of_the_rounded_rows(device: torch.device, dtype: torch.dtype, name: str, num_tokens: int,
                                               num_rows: int) -> None:
    x, weight, bias = case(num_tokens, num_rows, 384, device, dtype)
    out = fp8_linear(x, weight, bias, config=CONFIGS[name])
    assert out.dtype == dtype and relative_error(out, fp8_linear_reference(x, weight, bias)) < tolerance(dtype)


@pytest.mark.filterwarnings("ignore:All-NaN")  # of the interpreter's numpy
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_the_same_bits_alone_and_beside_nan(device: torch.device, name: str) -> None:
    x, weight, _ = case(7, 208, 384, device, torch.float16)
    alone = fp8_linear(x[3:4], weight, config=CONFIGS[name])
    x[4:] = float("nan")
    assert torch.equal(fp8_linear(x, weight, config=CONFIGS[name])[3], alone[0])


def test_who_quantizes_does_not_change_a_bit(device: torch.device) -> None:
    x, weight, bias = case(9, 208, 384, device, torch.float16)
    separate = fp8_linear(x, weight, bias, config=CONFIGS["plain"])
    assert torch.equal(fp8_linear(x, weight, bias, config=CONFIGS["quantizing"]), separate)
    assert torch.equal(fp8_linear_quantized(quantize_rows(x), weight, bias, x.dtype, config=CONFIGS["plain"]), separate)


def test_counters_are_zero_again_after_every_call(device: torch.device) -> None:
    x, weight, _ = case(7, 208, 384, device, torch.float16)
    counters = new_counters(weight)
    first = fp8_linear(x, weight, counters=counters, config=CONFIGS["split"])
    assert (counters == 0).all()
    assert torch.equal(fp8_linear(x, weight, counters=counters, config=CONFIGS["split"]), first)


def test_the_layer_takes_rows_of_any_shape(device: torch.device) -> None:
    x, weight, bias = case(6, 208, 384, device, torch.float16)
    layer = Fp8Linear(weight, bias)
    out = layer(x)
    assert torch.equal(layer(x.view(2, 3, 384)), out.view(2, 3, 208))
    wide = torch.cat((x, x), 1)
    assert torch.equal(layer(wide[:, :384]), out) and layer(x[:0]).shape == (0, 208)


def test_sizes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, weight, _ = case(2, 208, 384, device, torch.float16)
    with pytest.raises(ValueError, match="no product"):
        fp8_linear(x[:, :256], weight)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        fp8_linear_quantized(quantize_rows(x, column_major=False), weight, None, x.dtype)


def test_parts_of_k_are_equal() -> None:
    assert [module._splits(steps, 16) for steps in (56, 12, 4, 128, 16, 11)] == [14, 12, 4, 16, 16, 11]
    assert module._splits(56, 3) == 2


@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
def test_the_counters_suffice_for_every_config_of_the_table(num_rows: int, num_columns: int) -> None:
    weight = BlockFp8(torch.empty(num_rows, 128, dtype=torch.float8_e4m3fn), torch.empty(-(-num_rows // 128), 1))
    for num_tokens in (1, 16, 17, 64, 128, LIBRARY_ABOVE, 8192):
        config = config_for(num_tokens, num_rows, num_columns)
        tiles = -(-num_rows // config.block_n) * -(-num_tokens // config.block_t)
        assert config.splits == 1 or tiles <= new_counters(weight).numel()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 64, 100, 128, 300, 1001])
@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
def test_the_configs_of_the_table_are_right_on_real_sizes(device: torch.device, dtype: torch.dtype, num_tokens: int, num_rows: int,
                                                          num_columns: int) -> None:
    x, weight, bias = case(num_tokens, num_rows, num_columns, device, dtype)
    layer = Fp8Linear(weight, bias)
    first = layer(x)
    assert relative_error(first, fp8_linear_reference(x, weight, bias)) < tolerance(dtype)
    assert all(torch.equal(layer(x), first) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_product_follows_its_input(device: torch.device, name: str) -> None:
    x, weight, _ = case(48, 2112, 7168, device, torch.bfloat16)
    config, counters = dataclasses.replace(CONFIGS[name], splits=7), new_counters(weight)
    fp8_linear(x, weight, counters=counters, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_linear(x, weight, counters=counters, config=config)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert relative_error(out, fp8_linear_reference(x, weight)) < tolerance(torch.bfloat16)
