"""Sampling: equal to transformers' logits processors where they exist, to the plain formula where not."""

from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coordinator.sampling import SamplingParams
from workers.philox import uniforms
from workers.sampler import Sampler
from workers.sequence import Sequence
from workers.token_filters import keep

EOS = 3


def make_sequence(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    return Sequence(job_id="a", token_ids=[*prompt, *output], num_prompt=len(prompt), max_kv_tokens=1,
                    params=SamplingParams(max_new_tokens=10_000, **params))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def sample(logits: Tensor, *sequences: Sequence) -> tuple[list[int], list[float]]:
    return Sampler([EOS]).sample(logits.clone(), list(sequences))


def adjusted(logits: Tensor, sequence: Sequence) -> Tensor:
    """The row of logits as the sampler changes it."""
    changed = logits.clone()
    Sampler([EOS]).sample(changed, [sequence])
    return changed


@pytest.mark.parametrize("vocab_size", [5, 64, 100, 640, 1001])
def test_greedy_is_the_first_largest_logit_and_its_log_softmax(vocab_size: int) -> None:
    logits = random_logits(7, vocab_size)
    logits[2, 1] = logits[2, 4] = 50.0
    logits[3, -1] = 50.0
    token_ids, logprobs = sample(logits, *(make_sequence([1], []) for _ in range(7)))
    assert token_ids == logits.argmax(-1).tolist() and token_ids[2] == 1 and token_ids[3] == vocab_size - 1
    expected = logits.log_softmax(-1).amax(-1)
    assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-5)


def test_repetition_penalty_equals_transformers_over_the_output_or_over_all() -> None:
    logits = random_logits(1, 50)
    prompt, output = [1, 2, 3, 2], [4, 5, 4]
    for includes_prompt, seen in ((False, output), (True, prompt + output)):
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())
        ours = adjusted(logits, make_sequence(prompt, output, repetition_penalty=1.7, input_penalty=includes_prompt))
        assert torch.equal(ours, expected)


def test_frequency_and_presence_penalties_count_the_output() -> None:
    logits = random_logits(1, 20)
    ours = adjusted(logits, make_sequence([1, 1, 2], [4, 5, 4, 4], frequency_penalty=0.5, presence_penalty=0.25))
    expected = logits.clone()
    expected[0, 4] -= 3 * 0.5 + 0.25
    expected[0, 5] -= 0.5 + 0.25
    assert torch.allclose(ours, expected)


def test_counts_follow_a_sequence_as_it_grows() -> None:
    sequence = make_sequence([1], [], frequency_penalty=1.0)
    sampler, logits = Sampler([EOS]), torch.zeros(1, 30)
    for step in range(60):
        changed = logits.clone()
        sampler.sample(changed, [sequence])
        expected = -np.bincount(sequence.token_ids[1:], minlength=30).astype(np.float32)
        assert changed[0].tolist() == expected.tolist()
        sequence.token_ids.append(step % 17)


@pytest.mark.parametrize("num_output", [0, 2, 3, 9])
def test_exponential_decay_length_penalty_equals_transformers(num_output: int) -> None:
    logits = random_logits(1, 20)
    sequence = make_sequence([1, 2], [7] * num_output, exponential_decay_length_penalty=(2, 1.3))
    expected = ExponentialDecayLengthPenalty((2, 1.3), EOS, 2)(torch.tensor([sequence.token_ids]), logits.clone())
    assert torch.allclose(adjusted(logits, sequence), expected)


def test_a_huge_length_penalty_makes_eos_certain_instead_of_overflowing() -> None:
    sequence = make_sequence([1], [7] * 5000, exponential_decay_length_penalty=(1, 10.0))
    token_ids, logprobs = sample(random_logits(1, 20).abs() + 0.1, sequence)
    assert (token_ids, logprobs) == ([EOS], [0.0])


@pytest.mark.parametrize(("num_output", "is_masked"), [(0, True), (1, True), (2, False)])
def test_eos_is_masked_until_it_would_be_token_number_min_new_tokens(num_output: int, is_masked: bool) -> None:
    logits = torch.zeros(1, 20)
    logits[0, EOS] = 9.0
    token_ids, logprobs = sample(logits, make_sequence([1], [7] * num_output, min_new_tokens=3))
    assert (token_ids[0] != EOS) == is_masked
    assert is_masked == (logprobs[0] < -2.0), "the log probability is of the masked distribution"


def test_only_allowed_tokens_are_drawn_even_if_that_is_eos_too_early() -> None:
    logits = random_logits(1, 200)
    for seed in range(20):
        token_ids, _ = sample(logits, make_sequence([1], [], do_sample=True, seed=seed, temperature=3.0, allowed_token_ids=(5, 150)))
        assert token_ids[0] in (5, 150)
    assert sample(logits, make_sequence([1], [], allowed_token_ids=(EOS,), min_new_tokens=4)) == ([EOS], [0.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), vocab_size=st.sampled_from([10, 64, 999, 4096]), scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
       temperature=st.sampled_from([0.3, 1.0, 1.7]), top_k=st.sampled_from([-1, 2, 5, 50, 900, 10_000]),
       top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]), min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]))
def test_filters_keep_what_transformers_keeps(seed: int, vocab_size: int, scale: float, temperature: float, top_k: int, top_p: float,
                                              min_p: float) -> None:
    logits = random_logits(2, vocab_size, seed, scale) if scale else random_logits(2, vocab_size, seed, 1e-3)
    scores = TemperatureLogitsWarper(temperature)(None, logits.clone()) if temperature != 1.0 else logits.clone()
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0.0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = scores.softmax(-1)
    params = SamplingParams(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    weights, token_ids = keep((logits / temperature).softmax(-1), [params, params])
    ours = torch.zeros_like(expected).scatter_add_(1, token_ids, weights)
    ours /= ours.sum(-1, keepdim=True)
    num_differing = ((ours > 0) != (expected > 0)).sum(-1)
    assert bool((num_differing <= 1).all()), "one token at the very border of top_p may fall on either side by rounding"
    assert torch.allclose(ours[num_differing == 0], expected[num_differing == 0], atol=1e-5)


def test_top_k_and_top_p_are_exact_on_a_distribution_known_by_hand() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])

    def kept(**params: Any) -> list[int]:
        weights, token_ids = keep(probs, [SamplingParams(do_sample=True, **params)])
        return sorted(token_ids[weights > 0].tolist())

    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.6) == [1, 3]
    assert kept(top_p=0.75) == [1, 3, 4]
    assert kept(top_k=2, top_p=0.5) == [1]
    assert kept(top_k=2, top_p=0.6) == [1, 3], "0.4 is but 0.57 of what top_k left"
    assert kept(min_p=0.3) == [1, 3, 4]
    assert kept(top_p=0.0001) == [1]


def test_flat_and_peaked_rows_are_filtered_side_by_side() -> None:
    flat = torch.full((5000,), 1.0)
    flat[::2] += 0.5
    peaked = torch.zeros(5000)
    peaked[::60] = 20.0  # more tokens than the flat row has candidates at first
    probs = torch.stack([flat, peaked]).softmax(-1)
    weights, token_ids = keep(probs, [SamplingParams(do_sample=True, top_k=3, top_p=0.5), SamplingParams(do_sample=True, top_p=0.999)])
    assert (weights[0] > 0).sum() == 2500 and bool((token_ids[0][weights[0] > 0] % 2 == 0).all()), "ties stay together"
    assert token_ids[1][weights[1] > 0].tolist() == list(range(0, 5000, 60))


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.2, 0.05, 0.15, 0.1])
    num_draws = 4000
    sequences = [make_sequence([1], [7] * index, do_sample=True, seed=11) for index in range(num_draws)]
    token_ids, logprobs = sample(probs.log().expand(num_draws, -1), *sequences)
    counts = np.bincount(token_ids, minlength=6)
    assert counts[1] == 0
    expected = probs.numpy() * num_draws
    chi_squared = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_squared < 18.5  # 4 degrees of freedom, p = 0.001
    assert logprobs == pytest.approx([float(probs[token].log()) for token in token_ids], abs=1e-5)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution_in_vocabulary_order() -> None:
    logits = random_logits(1, 300, scale=1.0)
    cumulative = logits[0].double().softmax(-1).cumsum(-1).numpy()
    for seed in range(50):
        expected = int(np.searchsorted(cumulative, uniforms([seed], [2])[0], side="right"))
        assert sample(logits, make_sequence([1], [7, 7], do_sample=True, seed=seed))[0] == [expected]


def test_temperature_sharpens_the_draw_but_not_the_log_probability() -> None:
    logits = random_logits(1, 300)
    cold = make_sequence([1], [], do_sample=True, seed=5, temperature=0.01)
    token_ids, logprobs = sample(logits, cold)
    assert token_ids == [int(logits.argmax())]
    assert logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-5)


def test_the_same_seed_and_index_draw_the_same_token_in_any_company() -> None:
    vocab_size, rows = 1000, 12
    logits = random_logits(rows, vocab_size, scale=1.0)
    kinds: list[dict[str, Any]] = [
        {}, {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 2, "temperature": 0.5},
        {"do_sample": True, "seed": 3, "top_k": 5}, {"do_sample": True, "seed": 4, "top_p": 0.7, "frequency_penalty": 1.0},
        {"do_sample": True, "seed": 5, "min_p": 0.2, "temperature": 2.0}, {"min_new_tokens": 9},
        {"do_sample": True, "seed": 6, "allowed_token_ids": (3, 500, 900)}, {"exponential_decay_length_penalty": (1, 1.1)},
        {"do_sample": True, "seed": 7, "top_p": 0.99999}, {"do_sample": True, "top_k": 700, "top_p": 0.9, "temperature": 3.0}]

    def make(row: int) -> Sequence:
        return make_sequence([1, 2], [row, 5, 5], **kinds[row])

    together = sample(logits, *(make(row) for row in range(rows)))
    for row in range(rows):
        alone = sample(logits[row:row + 1], make(row))
        assert alone == ([together[0][row]], [together[1][row]]), kinds[row]


def test_a_row_without_numbers_does_not_disturb_its_batch_mates() -> None:
    logits = random_logits(3, 500)
    params = [{"do_sample": True, "seed": 1, "top_p": 0.9}, {"do_sample": True, "seed": 2, "top_p": 0.9, "top_k": 3}, {}]
    expected = [sample(logits[row:row + 1], make_sequence([1], [], **params[row])) for row in range(3)]
    logits[1] = float("nan")
    token_ids, logprobs = sample(logits, *(make_sequence([1], [], **given_params) for given_params in params))
    assert ([token_ids[0]], [logprobs[0]]) == expected[0] and ([token_ids[2]], [logprobs[2]]) == expected[2]
    assert not logprobs[1] > -inf


# ---- biases, likeliest tokens, guides ----


class FixedGuide:
    """Allows these tokens, always."""

    is_finished = False

    def __init__(self, vocab_size: int, *allowed: int) -> None:
        self._words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        for token_id in allowed:
            self._words[token_id // 32] |= np.uint32(1 << token_id % 32)

    def mask(self) -> np.ndarray[Any, Any]:
        return self._words.view(np.int32)


def test_a_bias_is_added_after_penalties() -> None:
    logits = random_logits(1, 50)
    changed = adjusted(logits, make_sequence([1], [7, 7], logit_bias=((7, 5.0), (9, -100.0)), repetition_penalty=2.0))
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[7, 7]]), logits.clone())
    expected[0, 7] += 5.0
    expected[0, 9] -= 100.0
    assert torch.allclose(changed, expected)
    assert sample(logits, make_sequence([1], [], logit_bias=((31, 100.0),)))[0] == [31]


@pytest.mark.parametrize("vocab_size", [32, 50, 64, 97])
def test_a_guide_lets_only_its_tokens_through(vocab_size: int) -> None:
    logits = random_logits(3, vocab_size)
    for seed in range(20):
        sequences = [make_sequence([1], [], do_sample=True, seed=seed, temperature=3.0, regular_constraint="x") for _ in range(3)]
        sequences[0].guide, sequences[2].guide = FixedGuide(vocab_size, 0, 31), FixedGuide(vocab_size, vocab_size - 1)  # type: ignore[assignment]
        token_ids, logprobs = sample(logits, *sequences)
        assert token_ids[0] in (0, 31) and (token_ids[2], logprobs[2]) == (vocab_size - 1, 0.0)
        pair = logits[0, [0, 31]].log_softmax(-1)
        assert logprobs[0] == pytest.approx(float(pair[(0, 31).index(token_ids[0])]), abs=1e-5)


def test_the_likeliest_tokens_are_told_before_temperature_and_after_penalties() -> None:
    logits = random_logits(3, 200)
    sequences = [make_sequence([1], [], top_logprobs=5, do_sample=True, seed=3, temperature=0.2, top_k=2), make_sequence([1], []),
                 make_sequence([1], [], top_logprobs=3, logit_bias=((8, 50.0),))]
    _, logprobs = sample(logits, *sequences)
    assert [len(sequence.tops) for sequence in sequences] == [1, 0, 1]
    expected = logits[0].log_softmax(-1).topk(5)
    told = sequences[0].tops[0]()
    assert [token_id for token_id, _ in told] == expected.indices.tolist()
    assert [logprob for _, logprob in told] == pytest.approx(expected.values.tolist(), abs=1e-5)
    biased = sequences[2].tops[0]()
    assert len(biased) == 3 and biased[0] == (8, logprobs[2])


def test_tokens_that_cannot_come_are_not_among_the_likeliest() -> None:
    sequence = make_sequence([1], [], top_logprobs=20, allowed_token_ids=(4, 5))
    sample(random_logits(1, 100), sequence)
    assert {token_id for token_id, _ in sequence.tops[0]()} == {4, 5}
