"""The balanced schedule: every key is someone's, nobody has much more than his share, partial results have slots of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.split_schedule import START_COST, SplitSchedule

Piece = tuple[int, int, int]  # program, first unit, end unit


def pieces_of(schedule: SplitSchedule, lens: list[int]) -> list[list[Piece]]:
    """What each sequence's programs do, read the way the kernels read it."""
    pieces: list[list[Piece]] = [[] for _ in lens]
    for program, (first_seq, first_unit, last_seq, end_unit) in enumerate(schedule.spans.tolist()):
        for seq in range(first_seq, last_seq + 1):
            begin = first_unit if seq == first_seq else 0
            end = end_unit if seq == last_seq else -(-lens[seq] // schedule.unit)
            if begin < end:
                pieces[seq].append((program, begin, end))
    return pieces


def refilled(lens: list[int], num_programs: int, device: torch.device, unit: int = 64) -> SplitSchedule:
    schedule = SplitSchedule.allocate(max(len(lens), 1), num_programs, device, unit)
    schedule.refill(torch.tensor(lens, dtype=torch.int32, device=device), len(lens))
    return schedule


def check(schedule: SplitSchedule, lens: list[int]) -> None:
    partial_slots: set[int] = set()
    for seq, pieces in enumerate(pieces_of(schedule, lens)):
        assert [begin for _, begin, _ in pieces] == [0, *(end for _, _, end in pieces)][: len(pieces)], "no gap, no overlap"
        assert (pieces[-1][2] if pieces else 0) == -(-lens[seq] // schedule.unit)
        if pieces:
            programs = [program for program, _, _ in pieces]
            assert programs == list(range(programs[0], programs[-1] + 1)) and schedule.owners[seq].tolist() == [programs[0], programs[-1]]
        if len(pieces) > 1:
            slots = {2 * program + (begin == 0) for program, begin, _ in pieces}
            assert len(slots) == len(pieces) and not slots & partial_slots and max(slots) < schedule.num_partials
            partial_slots |= slots


@settings(max_examples=15, deadline=None)
@given(lens=st.lists(st.integers(0, 5000) | st.sampled_from([0, 1, 64, 65, 200_000]), min_size=1, max_size=40),
       num_programs=st.integers(1, 9))
def test_every_key_belongs_to_one_program(device: torch.device, lens: list[int], num_programs: int) -> None:
    check(refilled(lens, num_programs, device), lens)


def test_programs_get_equal_shares_of_ragged_lengths(device: torch.device) -> None:
    lens = [130, 9000, 64, 0, 3000, 1, 20_000, 777]
    schedule = refilled(lens, 8, device)
    check(schedule, lens)
    shares = [0] * 8
    for pieces in pieces_of(schedule, lens):
        for program, begin, end in pieces:
            shares[program] += end - begin + START_COST
    assert max(shares) <= sum(shares) / 8 + 3 * START_COST


@pytest.mark.parametrize("num_seqs", [31, 32, 63, 64])
def test_equal_sequences_that_nearly_fill_the_programs_stay_whole(device: torch.device, num_seqs: int) -> None:
    schedule = refilled([4096] * num_seqs, 32, device)
    check(schedule, [4096] * num_seqs)
    assert [len(pieces) for pieces in pieces_of(schedule, [4096] * num_seqs)] == [1] * num_seqs


def test_a_lone_sequence_is_spread_over_all_programs(device: torch.device) -> None:
    assert len(pieces_of(refilled([64 * 80], 8, device), [64 * 80])[0]) == 8


@pytest.mark.parametrize("num_seqs", [1, 16, 33])
def test_padding_rows_are_nobodys_work(device: torch.device, num_seqs: int) -> None:
    schedule = refilled([0] * num_seqs, 4, device)
    assert all(first > last for first, _, last, _ in schedule.spans.tolist())


def test_a_fresh_schedule_has_no_work(device: torch.device) -> None:
    assert all(first > last for first, _, last, _ in SplitSchedule.allocate(4, 3, device).spans.tolist())


def test_the_whole_range_of_sizes(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(0, 200_000, (512,), generator=generator).tolist()
    check(refilled(lens, 6, device), lens)


def test_more_sequences_than_allocated_are_refused(device: torch.device) -> None:
    schedule = SplitSchedule.allocate(2, 4, device)
    with pytest.raises(ValueError, match="3 sequences"):
        schedule.refill(torch.ones(3, dtype=torch.int32, device=device), 3)
