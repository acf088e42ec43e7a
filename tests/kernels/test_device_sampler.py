"""The sampler for GPUs draws what the sampler for CPUs draws, also when the host does not know the newest token yet."""

import warnings
from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from coordinator.sampling import SamplingParams
from workers.device_sampler import DeviceSampler
from workers.sampler import Sampler
from workers.sequence import Sequence

EOS = 3
VOCAB = 97


def make_sequence(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    return Sequence(job_id="a", token_ids=[*prompt, *output], num_prompt=len(prompt), max_kv_tokens=1,
                    params=SamplingParams(**{"max_new_tokens": 10_000, **params}))


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def make_sampler(device: torch.device, max_num_seqs: int = 8, vocab_size: int = VOCAB) -> DeviceSampler:
    return DeviceSampler([EOS], max_num_seqs, vocab_size, device)


def launch(sampler: DeviceSampler, logits: Tensor, sequences: list[Sequence], device: torch.device) -> tuple[list[int], list[float]]:
    ids, logprobs = sampler.launch(logits.clone().to(device), sequences)
    return ids.tolist(), logprobs.tolist()


def advance(sequences: list[Sequence], token_ids: list[int]) -> None:
    for sequence, token in zip(sequences, token_ids, strict=True):
        sequence.token_ids.append(token)


params_of_a_row = st.fixed_dictionaries({}, optional={
    "do_sample": st.just(True), "seed": st.integers(0, 2**64 - 1), "temperature": st.sampled_from([1e-6, 0.2, 0.7, 1.0, 1.9]),
    "top_k": st.sampled_from([-1, 1, 2, 9, 80, 500]), "top_p": st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    "min_p": st.sampled_from([0.0, 0.02, 0.5]), "repetition_penalty": st.sampled_from([1.0, 1.4]),
    "frequency_penalty": st.sampled_from([0.0, 0.3]), "presence_penalty": st.sampled_from([0.0, 0.9]), "input_penalty": st.booleans(),
    "exponential_decay_length_penalty": st.sampled_from([(1, 1.0), (0, 1.2), (2, 3.0)]), "min_new_tokens": st.sampled_from([1, 2, 5]),
    "allowed_token_ids": st.sampled_from([(), (EOS,), (5, 96), (0, 3, 60, 61)]),
    "logit_bias": st.sampled_from([(), ((4, 2.5),), ((0, -100.0), (5, 100.0), (96, 0.5))]), "top_logprobs": st.sampled_from([0, 1, 20])})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(params_of_a_row, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_tokens_and_log_probabilities_are_those_of_the_cpu_sampler(device: torch.device, rows: list[dict[str, Any]], seed: int) -> None:
    ours, theirs = ([make_sequence([1, 2, 60, 2], [5, 7, 5], **row) for row in rows] for _ in range(2))
    sampler, expected_sampler = make_sampler(device), Sampler([EOS])
    for step in range(2):
        logits = random_logits(len(rows), seed=seed + step)
        token_ids, logprobs = launch(sampler, torch.cat([logits, torch.full((2, VOCAB), nan)]), ours, device)
        expected_ids, expected_logprobs = expected_sampler.sample(logits.clone(), theirs)
        assert token_ids == expected_ids
        assert logprobs == pytest.approx(expected_logprobs, abs=2e-5)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_tops(mine, other)
        advance(ours, token_ids)
        advance(theirs, token_ids)


def assert_same_tops(ours: Sequence, theirs: Sequence) -> None:
    assert len(ours.tops) == len(theirs.tops) == bool(ours.params.top_logprobs)
    if ours.tops:
        told, expected = ours.tops.popleft()(), theirs.tops.popleft()()
        assert [logprob for _, logprob in told] == pytest.approx([logprob for _, logprob in expected], abs=2e-5)
        assert {token_id for token_id, logprob in told if logprob > told[-1][1] + 1e-4} <= {token_id for token_id, _ in expected}


class FixedGuide:
    """Allows these tokens, always."""

    is_finished = False

    def __init__(self, *allowed: int) -> None:
        words = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
        for token_id in allowed:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._words = words.view(np.int32)

    def mask(self) -> NDArray[np.int32]:
        return self._words


def test_guided_rows_are_masked_and_their_batch_mates_are_not(device: torch.device) -> None:
    rows: list[dict[str, Any]] = [{"regular_constraint": "x"}, {}, {"regular_constraint": "x", "do_sample": True, "seed": 1, "top_p": 0.9},
                                  {"regular_constraint": "x", "top_logprobs": 5, "frequency_penalty": 2.0}]
    ours, theirs = ([make_sequence([1, 2], [5], **row) for row in rows] for _ in range(2))
    for sequences in (ours, theirs):
        for row, allowed in ((0, (31,)), (2, (0, 63, 64, 96)), (3, (5, 6))):
            sequences[row].guide = FixedGuide(*allowed)  # type: ignore[assignment]
    for seed in range(4):
        logits = random_logits(4, seed=seed)
        token_ids, logprobs = launch(make_sampler(device), logits, ours, device)
        expected_ids, expected_logprobs = Sampler([EOS]).sample(logits.clone(), theirs)
        assert token_ids == expected_ids and logprobs == pytest.approx(expected_logprobs, abs=2e-5)
        assert (token_ids[0], logprobs[0]) == (31, 0.0) and token_ids[2] in (0, 63, 64, 96) and len(ours[3].tops[0]()) == 2
        assert_same_tops(ours[3], theirs[3])


COUNTED: list[dict[str, Any]] = [{"frequency_penalty": 1.0}, {"repetition_penalty": 1.5, "input_penalty": True}, {},
                                 {"presence_penalty": 2.0, "do_sample": True, "seed": 4}]


def test_counts_follow_tokens_that_the_host_has_not_seen_yet(device: torch.device) -> None:
    """Two steps at a time: the result of one is taken in after the next was launched."""
    ours, theirs = ([make_sequence([1, 2], [], **params) for params in COUNTED] for _ in range(2))
    sampler, expected_sampler = make_sampler(device), Sampler([EOS])
    logits = random_logits(4, scale=0.3)  # nearly flat: penalties decide
    in_flight: list[list[int]] = []
    for _ in range(8):
        in_flight.append(launch(sampler, logits, ours, device)[0])
        for sequence in ours:
            sequence.num_in_flight += 1
        if len(in_flight) == 2:
            advance(ours, in_flight.pop(0))
            for sequence in ours:
                sequence.num_in_flight -= 1
        expected, _ = expected_sampler.sample(logits.clone(), theirs)
        assert in_flight[-1] == expected
        advance(theirs, expected)


def test_a_sequence_that_was_away_is_counted_right_when_its_row_went_to_another(device: torch.device) -> None:
    sampler = make_sampler(device, max_num_seqs=2)
    logits = random_logits(1, scale=0.3)
    ours, theirs = ([make_sequence([1], [], frequency_penalty=0.5) for _ in range(4)] for _ in range(2))
    for turn in [0, 1, 0, 2, 3, 0, 1, 2, 0, 0, 3]:
        token_ids, _ = launch(sampler, logits, [ours[turn]], device)
        expected, _ = Sampler([EOS]).sample(logits.clone(), [theirs[turn]])
        assert token_ids == expected
        advance([ours[turn], theirs[turn]], expected * 2)


def test_a_token_that_was_drawn_and_dropped_is_not_counted(device: torch.device) -> None:
    sampler, logits = make_sampler(device), random_logits(1, scale=0.3)
    sequence = make_sequence([1], [8, 8], frequency_penalty=9.0)
    first = launch(sampler, logits, [sequence], device)
    assert launch(sampler, logits, [sequence], device) == first, "it did not grow: the same step again"


def test_a_sequence_imported_with_output_has_its_output_counted(device: torch.device) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [8, 9]] = torch.tensor([3.0, 2.9])
    sequence = make_sequence([9], [8], presence_penalty=1.0)
    assert launch(make_sampler(device), logits, [sequence], device)[0] == [9]


def test_a_table_for_counts_comes_with_the_first_penalty_only(device: torch.device) -> None:
    sampler = make_sampler(device)
    sampler.warm_up()
    launch(sampler, random_logits(2), [make_sequence([1], []), make_sequence([1], [], do_sample=True, seed=1)], device)
    assert sampler._counts is None
    launch(sampler, random_logits(1), [make_sequence([1], [], presence_penalty=0.1)], device)
    assert sampler._counts is not None and sampler._counts.shape == (8, VOCAB)


def test_half_precision_logits_are_drawn_from_and_penalized(device: torch.device) -> None:
    logits = random_logits(3).half()
    rows: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 9, "top_p": 0.8}, {"repetition_penalty": 2.0}]
    ours, theirs = ([make_sequence([1], [4, 5], **row) for row in rows] for _ in range(2))
    token_ids, logprobs = launch(make_sampler(device), logits, ours, device)
    expected_ids, expected_logprobs = Sampler([EOS]).sample(logits.float(), theirs)
    assert token_ids == expected_ids and logprobs == pytest.approx(expected_logprobs, abs=2e-5)


def test_no_sequences_need_no_launch(device: torch.device) -> None:
    assert launch(make_sampler(device), torch.empty(0, VOCAB), [], device) == ([], [])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which stands for the GPU
def test_a_row_without_numbers_fails_alone(device: torch.device) -> None:
    logits = random_logits(3)
    rows: list[dict[str, Any]] = [{"do_sample": True, "seed": 1, "top_p": 0.9}, {"do_sample": True, "top_k": 3, "top_p": 0.9}, {}]

    def drawn() -> list[tuple[int, float]]:
        sequences = [make_sequence([1], [], **row) for row in rows]
        return list(zip(*launch(make_sampler(device), logits, sequences, device), strict=True))

    expected = drawn()
    logits[1] = nan
    first, (token, logprob), last = drawn()
    assert (first, last) == (expected[0], expected[2])
    assert 0 <= token < VOCAB and logprob != logprob


@pytest.mark.gpu
def test_a_launch_never_waits_for_the_device(device: torch.device) -> None:
    sampler = make_sampler(device, vocab_size=102_400)
    sampler.warm_up()
    logits = torch.randn(8, 102_400, device=device)
    rows = [*COUNTED, {"do_sample": True, "top_p": 0.9, "seed": 1}, {"allowed_token_ids": (4, 5)}, {"min_new_tokens": 5},
            {"logit_bias": ((3, 1.0), (9, -4.0)), "top_logprobs": 7, "regular_constraint": "x"}]
    sequences = [make_sequence([1, 2], [], **row) for row in rows]
    sequences[-1].guide = FixedGuide(9)  # type: ignore[assignment]
    sequences[-1].guide._words = np.full(-(-102_400 // 32), -1, dtype=np.int32)  # type: ignore[union-attr, attr-defined]
    with warnings.catch_warnings(action="ignore"):  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            sampler.launch(logits, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
