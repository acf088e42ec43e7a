"""Rows sorted by expert, against lists sorted in Python."""

import pytest
import torch
from torch import Tensor

from kernels import align as module
from kernels.align import Aligned, align, align_reference, allocate


def random_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].int().contiguous().to(device)


def check(aligned: Aligned, ids: Tensor, num_experts: int) -> None:
    rows, experts = align_reference(ids, num_experts, aligned.block_m)
    num_unused = aligned.num_blocks - len(experts)
    assert num_unused >= 0
    assert aligned.sorted_rows.tolist() == rows + [ids.numel()] * (num_unused * aligned.block_m)
    assert aligned.block_experts.tolist() == experts + [-1] * num_unused + [len(experts)]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "block_m"), [
    (1, 64, 6, 16), (1, 66, 8, 16), (5, 8, 2, 16), (37, 10, 3, 16), (64, 66, 8, 16), (200, 7, 4, 128), (1, 1, 1, 16)])
def test_rows_are_sorted_by_expert_and_position(device: torch.device, num_tokens: int, num_experts: int, top_k: int, block_m: int) -> None:
    ids = random_ids(num_tokens, num_experts, top_k, device)
    check(align(ids, num_experts, block_m), ids, num_experts)


@pytest.mark.parametrize("num_padding", [1, 17, 40])
def test_padding_comes_after_all_experts(device: torch.device, num_padding: int) -> None:
    ids = random_ids(40, 9, 3, device)
    ids[40 - num_padding:] = -1
    check(align(ids, 9, 16), ids, 9)


def test_experts_that_nobody_chose_have_no_block(device: torch.device) -> None:
    ids = torch.tensor([[5, 2], [2, 5], [5, 2]], dtype=torch.int32, device=device)
    aligned = align(ids, 8, 16)
    check(aligned, ids, 8)
    assert aligned.block_experts[-1] == 2


def test_all_rows_may_go_to_one_expert(device: torch.device) -> None:
    ids = torch.full((100, 1), 3, dtype=torch.int32, device=device)
    check(align(ids, 4, 16), ids, 4)


def test_many_rows_are_shared_among_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 32)
    monkeypatch.setattr(module, "MAX_CHUNKS", 3)
    ids = random_ids(110, 5, 2, device)
    ids[::7] = -1
    check(align(ids, 5, 16), ids, 5)


def test_no_rows_need_no_blocks(device: torch.device) -> None:
    aligned = align(torch.empty(0, 6, dtype=torch.int32, device=device), 64, 16)
    assert aligned.num_blocks == 0 and aligned.block_experts.tolist() == [0]


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_there_is_room_for_the_most_wasteful_choice(block_m: int) -> None:
    for num_rows in (1, 6, 67, 130, 1000):
        counts = [num_rows // 9 + (expert < num_rows % 9) for expert in range(9)]   # 8 experts and padding
        needed = sum(-(-count // block_m) for count in counts)
        spread = sum(1 for count in counts if count)
        worst = max(needed, spread)
        assert allocate(num_rows, 8, block_m, torch.device("cpu")).num_blocks >= worst


def test_ids_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        align(torch.zeros(2, 2, dtype=torch.int64), 4, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "top_k"), [(64, 6), (66, 8), (257, 9)])
@pytest.mark.parametrize("num_tokens", [128, 1000, 8192])
def test_large_steps_are_sorted_by_expert_and_position(device: torch.device, num_tokens: int, num_experts: int, top_k: int) -> None:
    ids = random_ids(num_tokens, num_experts, top_k, device)
    ids[num_tokens - 5:] = -1
    for block_m in (16, 128):
        check(align(ids, num_experts, block_m), ids, num_experts)
