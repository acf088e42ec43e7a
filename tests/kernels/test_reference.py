"""Reference operations against independent formulas, and the CPU forms against the reference."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import cpu, linear, reference
from kernels.ops import CPU as CPU_OPS
from kernels.ops import PLAIN, ops_for
from kernels.plan import make_plan

CPU = torch.device("cpu")
PAGE_SIZE = 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < relative, f"relative error {error:.2e}"


def test_the_package_is_ours_and_tells_transformers_so() -> None:
    kernels = importlib.import_module("kernels")
    assert Path(str(kernels.__file__)).parent == Path(str(reference.__file__)).parent and kernels.__version__ == "0"


def test_unknown_devices_get_the_plain_operations() -> None:
    assert ops_for(CPU) is CPU_OPS and ops_for(torch.device("meta")) is PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    x, weight = randn(5, 48, dtype=dtype), randn(48, seed=1, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    for op in (reference.rms_norm, cpu.rms_norm):
        assert_close(op(x, weight, 1e-5), expected, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_turns_neighbouring_pairs_in_place(dtype: torch.dtype) -> None:
    angles = randn(3, 4)
    rotation = torch.stack((angles.cos(), angles.sin()), -1)
    for op in (reference.rotate_, cpu.rotate_):
        x = randn(3, 5, 12, dtype=dtype)
        before = x.clone()
        op(x[..., 4:], rotation)
        assert torch.equal(x[..., :4], before[..., :4])
        pairs = torch.view_as_complex(before[..., 4:].float().unflatten(-1, (-1, 2)).contiguous())
        expected = torch.view_as_real(pairs * torch.polar(torch.ones(3, 1, 4), angles.unsqueeze(1))).flatten(-2)
        assert_close(x[..., 4:], expected, 1e-6 if dtype == torch.float32 else 1e-2)


def test_silu_mul_gates_the_second_half_by_the_first() -> None:
    x = randn(3, 10)
    gate, up = x[:, :5], x[:, 5:]
    for op in (reference.silu_mul, cpu.silu_mul):
        assert_close(op(x), gate / (1 + (-gate).exp()) * up, 1e-6)


def test_softmax_routing_takes_the_best_experts_of_the_best_groups() -> None:
    logits = torch.tensor([[5.0, 0.0, 4.0, 3.9, 0.0, 4.5]])  # three groups of two; the best experts of each: 5.0, 4.0, 4.5
    scores = logits.softmax(-1)[0]
    ids, weights = reference.route_softmax(logits, 3, 3, 2, 16.0)
    assert set(ids[0].tolist()) >= {0, 5} and not {2, 3} & set(ids[0].tolist())
    for expert, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True):
        assert weight == pytest.approx(16.0 * scores[expert].item())
    ids, _ = reference.route_softmax(logits, 3, 1, 1, 1.0)
    assert set(ids[0].tolist()) == {0, 2, 5}


def test_noaux_routing_chooses_with_the_bias_and_weighs_without_it() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0, -1.0, 3.0]])
    bias = torch.tensor([0.0, 0.0, 5.0, 5.0, 0.0, 0.0])  # lifts the middle group, whose scores are small
    ids, weights = reference.route_noaux(logits, bias, 2, 3, 1, 2.5, True)
    assert set(ids[0].tolist()) == {2, 3}
    assert weights[0].tolist() == pytest.approx([1.25, 1.25])
    ids, weights = reference.route_noaux(logits, bias, 3, 3, 2, 2.5, False)
    by_id = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert by_id == pytest.approx({2: 1.25, 3: 1.25, 0: 2.5 / (1 + math.exp(-2))})


def test_a_choice_of_none_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    x, gate_up, down = (torch.randn(shape, generator=generator) for shape in ((4, 8), (3, 12, 8), (3, 8, 6)))
    ids, weights = torch.tensor([[0, -1], [-1, -1], [2, 1], [-1, 0]], dtype=torch.int32), torch.rand(4, 2, generator=generator)
    expected = reference.fused_experts(x, gate_up, down, ids.clamp(min=0), weights * (ids >= 0))
    assert_close(reference.fused_experts(x, gate_up, down, ids, weights), expected, 1e-6)


def test_fused_experts_equal_a_loop_over_tokens() -> None:
    x, gate_up, down = randn(9, 16), randn(5, 24, 16, seed=1), randn(5, 16, 12, seed=2)
    ids = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)])
    weights = randn(9, 2, seed=3).abs()
    expected = torch.zeros(9, 16, dtype=torch.float64)
    for token in range(9):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weight * (down[expert].double() @ (gate * gate.sigmoid() * up))
    assert_close(reference.fused_experts(x, gate_up, down, ids, weights), expected, 1e-6)


LENGTHS = {"equal": [9, 9, 9], "near": [9, 12, 1, 7], "far apart": [300, 3, 290, 2, 5], "one": [33]}


def make_decodes(lens: list[int], num_pages: int = 200) -> tuple[list[list[int]], int]:
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(5)).tolist()
    tables = [[order.pop() for _ in range(-(-length // PAGE_SIZE))] for length in lens]
    tables[0] = sorted(tables[0])
    return tables, num_pages * PAGE_SIZE


def slots_of(pages: list[int], length: int) -> list[int]:
    return [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(length)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LENGTHS)
def test_gqa_decode_attends_to_each_sequence_alone(case: str, dtype: torch.dtype) -> None:
    lens = LENGTHS[case]
    tables, num_slots = make_decodes(lens)
    cache = randn(2, num_slots, 2, 16, dtype=dtype)
    q = randn(len(lens), 6, 16, seed=1, dtype=dtype)
    plan = make_plan([1] * len(lens), lens, tables, PAGE_SIZE, CPU, dtype)
    expected = torch.empty(q.shape, dtype=torch.float64)
    for i, length in enumerate(lens):
        keys, values = cache[:, slots_of(tables[i], length)].double()
        for head in range(6):
            weights = (keys[:, head // 3] @ q[i, head].double() * 0.3).softmax(0)
            expected[i, head] = weights @ values[:, head // 3]
    assert (len(plan.groups) > 1) == (case == "far apart")
    for op in (reference.gqa_decode, cpu.gqa_decode):
        out = torch.empty_like(q)
        for group in plan.groups:
            rows = slice(None) if group.rows is None else group.rows
            out[rows] = op(q[rows], cache, group, 0.3)
        assert_close(out, expected, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("case", LENGTHS)
def test_mla_decode_attends_to_the_latents(case: str) -> None:
    lens = LENGTHS[case]
    tables, num_slots = make_decodes(lens)
    cache, q = randn(num_slots, 20), randn(len(lens), 3, 20, seed=1)
    plan = make_plan([1] * len(lens), lens, tables, PAGE_SIZE, CPU, torch.float32)
    for group in plan.groups:
        rows = list(range(len(lens))) if group.rows is None else group.rows.tolist()
        for op in (reference.mla_decode, cpu.mla_decode):
            out = op(q[rows], cache, group, 0.2, 16)
            for i, row in enumerate(rows):
                latents = cache[slots_of(tables[row], lens[row])].double()
                weights = (latents @ q[row].double().T * 0.2).softmax(0)
                assert_close(out[i], weights.T @ latents[:, :16])


@pytest.mark.parametrize(("query_len", "seq_len"), [(13, 13), (5, 13), (2, 4)])
def test_a_chunk_attends_to_what_came_before_and_causally_to_itself(query_len: int, seq_len: int) -> None:
    tables, num_slots = make_decodes([3, seq_len])
    cache, q = randn(2, num_slots, 2, 16), randn(query_len, 4, 16, seed=1)
    plan = make_plan([1, query_len], [3, seq_len], tables, PAGE_SIZE, CPU, torch.float32)
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.end) == (1, 1 + query_len)
    out = reference.gqa_chunk(q, cache, chunk, 0.25)
    keys, values = cache[:, slots_of(tables[1], seq_len)].double()
    for row in range(query_len):
        seen = seq_len - query_len + row + 1
        for head in range(4):
            weights = (keys[:seen, head // 2] @ q[row, head].double() * 0.25).softmax(0)
            assert_close(out[row, head], weights @ values[:seen, head // 2])


def test_mla_chunk_and_absorbed_decode_agree() -> None:
    """Decompressing keys and values, or absorbing the same weights into query and output, is the same attention."""
    tables, num_slots = make_decodes([11])
    cache, kv_b = randn(num_slots, 20), randn(3, 8 + 6, 16, seed=1)
    q = randn(2, 3, 8 + 4, seed=2)
    chunk = make_plan([2], [11], tables, PAGE_SIZE, CPU, torch.float32).chunks[0]
    group = make_plan([1], [11], tables, PAGE_SIZE, CPU, torch.float32).groups[0]
    absorbed = torch.cat((torch.einsum("nhd,hdr->nhr", q[1:, :, :8], kv_b[:, :8]), q[1:, :, 8:]), -1)
    decoded = torch.einsum("nhr,hvr->nhv", reference.mla_decode(absorbed, cache, group, 0.3, 16), kv_b[:, 8:])
    assert_close(reference.mla_chunk(q, cache, chunk, kv_b, 0.3)[1:], decoded)


def test_stored_rows_land_in_their_slots_only() -> None:
    slots = torch.tensor([7, 2, 9])
    cache, kv = torch.zeros(2, 12, 2, 4), randn(3, 4, 4)
    reference.store_gqa(kv, cache, slots)
    assert torch.equal(cache[0, slots], kv[:, :2]) and torch.equal(cache[1, slots], kv[:, 2:])
    assert cache.count_nonzero() == kv.numel()
    latents, rows = torch.zeros(12, 5), randn(3, 5)
    reference.store_mla(rows, latents, slots)
    assert torch.equal(latents[slots], rows) and latents.count_nonzero() == rows.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
def test_packed_products_equal_plain_ones(rows: int, stored: torch.dtype, dtype: torch.dtype, bias: bool) -> None:
    weight = randn(40, 33).mul_(0.05).to(stored).to(dtype)
    offset = randn(40, seed=1, dtype=dtype) if bias else None
    x = randn(rows, 33, seed=2, dtype=dtype)
    expected = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    for make in (linear.plain_linear, linear.cpu_linear):
        out = make(weight, offset)(x)
        assert out.dtype == dtype
        assert_close(out, expected, 5e-7 if dtype == torch.float32 else 1e-2)


def test_only_weights_that_float16_holds_are_stored_in_it() -> None:
    weight = randn(50, 60).mul_(0.02)
    assert linear.is_float16_exact(weight.half().float())
    assert linear.is_float16_exact(weight.bfloat16().float())
    assert not linear.is_float16_exact(weight)
    assert not linear.is_float16_exact(torch.full((2, 2), 1e6))
