"""The choice of experts against plain torch, and its order against `align`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import routing as module
from kernels.align import Aligned, align, allocate
from kernels.routing import route, route_reference

V2_LITE: dict[str, Any] = {"top_k": 6, "num_shared": 2}
V2: dict[str, Any] = {"top_k": 6, "num_groups": 8, "groups_per_token": 3, "scaling_factor": 16.0, "num_shared": 2}
V3: dict[str, Any] = {"top_k": 8, "num_groups": 8, "groups_per_token": 4, "scaling_factor": 2.5, "normalize": True, "num_shared": 1}
TINY: dict[str, Any] = {"top_k": 3, "num_groups": 3, "groups_per_token": 2, "normalize": True}
GATES = [(V2_LITE, 64, False), (V2, 160, False), (V3, 256, True), (TINY, 12, True), (TINY, 12, False)]


def inputs(num_tokens: int, num_experts: int, biased: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, generator=generator).to(device)
    return logits, (torch.randn(num_experts, generator=generator) * 0.1).to(device) if biased else None


def as_dense(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E] weights."""
    return torch.zeros(ids.shape[0], num_experts, device=ids.device).scatter_add_(1, ids.long(), weights)


def room(ids: Tensor, num_experts: int) -> Aligned:
    return allocate(ids.numel(), num_experts, 16, ids.device)


def check_order(aligned: Aligned, ids: Tensor, num_experts: int) -> None:
    expected = align(ids, num_experts, aligned.block_m)
    assert torch.equal(aligned.sorted_rows, expected.sorted_rows)
    assert torch.equal(aligned.block_experts, expected.block_experts)


@pytest.mark.parametrize(("gate", "num_experts", "biased"), GATES)
@pytest.mark.parametrize("num_tokens", [1, 3, 33])
def test_experts_and_weights_are_those_of_the_reference(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool,
                                                        num_tokens: int) -> None:
    logits, bias = inputs(num_tokens, num_experts, biased, device)
    ids, weights = route(logits, bias, **gate)
    expected_ids, expected_weights = route_reference(logits, bias, **gate)
    assert torch.equal(ids.sort(1)[0], expected_ids.sort(1)[0])
    torch.testing.assert_close(as_dense(ids, weights, num_experts + 2), as_dense(expected_ids, expected_weights, num_experts + 2),
                               rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("gate", "num_experts", "biased", "num_valid"), [
    *((*GATES[0], num_valid) for num_valid in (None, 0, 5, 100)), (*GATES[1], 5), (*GATES[2], 4), (*GATES[3], None)])
def test_routing_and_sorting_in_one_launch_equals_two(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool,
                                                      num_valid: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONE_PROGRAM", 8_192)
    logits, bias = inputs(7, num_experts, biased, device)
    bound = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=device)
    ids, weights = route(logits, bias, **gate, num_valid=bound)
    num_all = num_experts + gate.get("num_shared", 0)
    aligned = room(ids, num_all)
    fused_ids, fused_weights = route(logits, bias, **gate, num_valid=bound, aligned=aligned)
    assert torch.equal(fused_ids, ids) and torch.equal(fused_weights, weights)
    check_order(aligned, ids, num_all)


@pytest.mark.parametrize("one_program", [0, 8_192])
def test_experts_with_more_than_one_block_are_sorted_too(device: torch.device, one_program: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONE_PROGRAM", one_program)   # with 0, `align` has a launch of its own
    logits, _ = inputs(60, 4, False, device)
    ids, _ = route(logits, None, top_k=2, num_shared=1)
    aligned = room(ids, 5)
    route(logits, None, top_k=2, num_shared=1, aligned=aligned)
    check_order(aligned, ids, 5)


@pytest.mark.parametrize(("gate", "num_experts", "biased"), GATES[1:3])
def test_padding_has_no_expert_whatever_its_logits(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool) -> None:
    logits, bias = inputs(7, num_experts, biased, device)
    expected_ids, expected_weights = route(logits[:4], bias, **gate)
    logits[4:] = float("nan")
    ids, weights = route(logits, bias, **gate, num_valid=torch.tensor([4], dtype=torch.int32, device=device))
    assert torch.equal(ids[:4], expected_ids) and torch.equal(weights[:4], expected_weights)
    assert (ids[4:] == -1).all() and (weights[4:] == 0).all()


@pytest.mark.parametrize(("gate", "num_experts", "biased"), GATES)
def test_broken_logits_still_choose_distinct_experts(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool) -> None:
    logits, bias = inputs(3, num_experts, biased, device)
    logits[0] = float("nan")
    logits[1, ::2] = float("nan")
    logits[2] = float("-inf")
    for row in route(logits, bias, **gate)[0].tolist():
        assert len(set(row)) == len(row) and all(0 <= expert < num_experts + 2 for expert in row)


@pytest.mark.parametrize(("gate", "num_experts", "biased"), GATES)
def test_logits_in_parts_are_added_in_their_order(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool) -> None:
    parts = torch.stack([inputs(seed, num_experts, biased, device)[0][:3] for seed in (3, 4, 5)])
    _, bias = inputs(3, num_experts, biased, device)
    expected_ids, expected_weights = route(parts[0] + parts[1] + parts[2], bias, **gate)
    num_valid = torch.tensor([3], dtype=torch.int32, device=device)
    ids, weights = route(torch.nn.functional.pad(parts, (0, 0, 0, 2), value=float("nan")), bias, **gate, num_valid=num_valid)
    assert torch.equal(ids[:3], expected_ids) and torch.equal(weights[:3], expected_weights) and (ids[3:] == -1).all()


def test_the_lower_of_equal_experts_comes_first(device: torch.device) -> None:
    logits = torch.zeros(2, 64, device=device)
    logits[1, [50, 9, 30]] = 1.0
    ids, _ = route(logits, None, **V2_LITE)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5, 64, 65], [9, 30, 50, 0, 1, 2, 64, 65]]


def test_a_token_is_routed_the_same_in_any_batch(device: torch.device) -> None:
    logits, bias = inputs(33, 256, True, device)
    ids, weights = route(logits, bias, **V3)
    for token in (0, 32):
        alone_ids, alone_weights = route(logits[token:token + 1], bias, **V3, aligned=room(ids[:1], 257))
        assert torch.equal(alone_ids[0], ids[token]) and torch.equal(alone_weights[0], weights[token])


def test_more_experts_than_the_groups_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose 6 experts from 1 of 4 groups"):
        route(torch.zeros(2, 16), None, top_k=6, num_groups=4)


def test_logits_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        route(torch.zeros(2, 64, dtype=torch.float16), None, **V2_LITE)


def test_no_tokens_choose_nothing(device: torch.device) -> None:
    aligned = allocate(0, 66, 16, device)
    ids, weights = route(torch.empty(0, 64, device=device), None, **V2_LITE, aligned=aligned)
    assert ids.shape == weights.shape == (0, 8) and aligned.block_experts.tolist() == [0]


@pytest.mark.gpu
@pytest.mark.parametrize(("gate", "num_experts", "biased"), GATES)
@pytest.mark.parametrize("num_tokens", [64, 256, 1000, 8192])
def test_large_steps_are_routed_and_sorted_alike(device: torch.device, gate: dict[str, Any], num_experts: int, biased: bool,
                                                 num_tokens: int) -> None:
    logits, bias = inputs(num_tokens, num_experts, biased, device)
    num_all = num_experts + gate.get("num_shared", 0)
    aligned = allocate(num_tokens * (gate["top_k"] + gate.get("num_shared", 0)), num_all, 16, device)
    ids, weights = route(logits, bias, **gate, aligned=aligned)
    expected_ids, expected_weights = route_reference(logits, bias, **gate)
    differing = (ids.sort(1)[0] != expected_ids.sort(1)[0]).any(1)
    assert differing.float().mean() < 1e-3   # a near tie may fall either way
    dense, expected = as_dense(ids, weights, num_all), as_dense(expected_ids, expected_weights, num_all)
    torch.testing.assert_close(dense[~differing], expected[~differing], rtol=2e-5, atol=1e-6)
    check_order(aligned, ids, num_all)
