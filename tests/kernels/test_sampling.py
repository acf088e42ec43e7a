"""Survey and draw, against a softmax and against thresholds found by sorting; penalties, against the formula."""

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.draw import draw
from kernels.penalize import Config as PenalizeConfig
from kernels.penalize import count_tokens, penalize
from kernels.row_params import ALLOWED_START, COUNT_ROW, INDEX, NUM_ALLOWED, WORDS, RowParams
from kernels.survey import Config, survey
from workers.philox import uniforms

SMALL = Config(block=128, survey_warps=1, draw_warps=4)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def pack(rows: list[RowParams], device: torch.device, extra: list[int] | None = None, **columns: list[int]) -> Tensor:
    words = torch.frombuffer(bytearray(b"".join(row.pack() for row in rows)), dtype=torch.int64).view(len(rows), WORDS.value)
    places = {"index": INDEX, "count_row": COUNT_ROW, "allowed_start": ALLOWED_START, "num_allowed": NUM_ALLOWED}
    for name, values in columns.items():
        words[:, places[name].value] = torch.tensor(values)
    return torch.cat([words.flatten(), torch.tensor(extra or [], dtype=torch.int64)]).to(device)


def sample(logits: Tensor, rows: list[RowParams], device: torch.device, config: Config = SMALL, **columns: list[int]) -> tuple[Any, Tensor]:
    words, on_device = pack(rows, device, **columns), logits.to(device)
    ids, logprobs = draw(on_device, survey(on_device, len(rows), words, config=config), words)
    return ids.tolist(), logprobs.cpu()


def kept_by_sorting(logits: Tensor, params: RowParams) -> Tensor:
    """Which tokens of one row may be drawn: bool [V]."""
    probs = (logits.double() / params.temperature).softmax(-1)
    ordered = probs.sort(descending=True).values
    top_k = params.top_k or len(probs)
    cumulative = ordered.cumsum(0)
    by_mass = ordered[int((cumulative < params.top_p * cumulative[top_k - 1]).sum().clamp(max=len(probs) - 1))] if params.top_p < 1 else 0.0
    return (probs >= ordered[top_k - 1]) & (probs >= by_mass) & (probs >= params.min_p * ordered[0])


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 97, 640, 1001])
def test_the_first_largest_logit_is_taken_with_its_log_softmax(device: torch.device, vocab_size: int) -> None:
    logits = random_logits(4, vocab_size)
    logits[1, vocab_size // 2] = logits[1, vocab_size // 3] = 50.0
    logits[2, -1] = 50.0
    padded = torch.cat([logits, torch.full((2, vocab_size), nan)]).to(device)
    ids, logprobs = draw(padded, survey(padded, 4, config=SMALL))
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(logprobs.cpu(), logits.log_softmax(-1).amax(-1), atol=1e-5)


def test_logits_may_be_half_precision_and_strided(device: torch.device, dtype: torch.dtype) -> None:
    logits = random_logits(3, 400).to(dtype)
    wide = logits.to(device)[:, :300]
    ids, logprobs = draw(wide, survey(wide, 3, config=SMALL))
    assert ids.tolist() == logits[:, :300].float().argmax(-1).tolist()
    assert torch.allclose(logprobs.cpu(), logits[:, :300].float().log_softmax(-1).amax(-1), atol=1e-5)


FILTERS: list[dict[str, Any]] = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 7}, {"top_k": 150}, {"top_k": 400}, {"top_p": 0.01},
    {"top_p": 0.5}, {"top_p": 0.97}, {"top_p": 0.999999}, {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.8},
    {"top_k": 300, "top_p": 0.9, "min_p": 0.01}, {"temperature": 0.05, "top_k": 50, "top_p": 0.9}, {"temperature": 50.0, "top_p": 0.5},
    {"temperature": 1e300, "top_k": 3}]
FEW = [{}, {"top_k": 7}, {"top_p": 0.5}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1}]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_are_the_inverse_of_the_filtered_cumulative_distribution(device: torch.device, filters: dict[str, Any]) -> None:
    vocab_size, seeds = 401, [3, 2**64 - 1, 77]
    logits = random_logits(3, vocab_size, seed=len(str(filters)))
    logits[1] = logits[1].round()     # many ties
    logits[2, 5:200] = -inf
    rows = [RowParams(is_sampled=True, seed=seed, **filters) for seed in seeds]
    indexes = [0, 2**33 + 5, 9]
    ids, logprobs = sample(logits, rows, device, index=indexes)
    for row, number in enumerate(uniforms(seeds, indexes)):
        weights = (logits[row].double() / rows[row].temperature).softmax(-1) * kept_by_sorting(logits[row], rows[row])
        if rows[row].temperature > 1e30:
            continue                  # float32 and float64 agree on nothing there, but that tokens must be kept
        cumulative = weights.cumsum(0) / weights.sum()
        assert ids[row] == int((cumulative <= float(number)).sum()), rows[row]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).flatten()
    assert torch.allclose(logprobs, expected, atol=1e-5)


def test_a_row_of_equal_logits_keeps_them_all(device: torch.device) -> None:
    rows = [RowParams(is_sampled=True, seed=seed, top_k=3, top_p=0.5) for seed in range(3)]
    ids, _ = sample(torch.full((3, 333), 1.5), rows, device)
    assert ids == [int(number * 333) for number in uniforms(list(range(3)), [0] * 3)]


def test_rows_are_the_same_bits_in_any_company(device: torch.device) -> None:
    logits = random_logits(len(FEW) + 1, 300)
    rows = [RowParams(), *(RowParams(is_sampled=True, seed=seed, **filters) for seed, filters in enumerate(FEW))]
    ids, logprobs = sample(logits, rows, device)
    for row in range(len(rows)):
        alone, score = sample(logits[row : row + 1], rows[row : row + 1], device)
        assert alone == [ids[row]] and score.tolist() == [logprobs[row].item()]
    on_device = logits[:1].to(device)
    plain = draw(on_device, survey(on_device, 1, config=SMALL))
    assert (plain[0].item(), plain[1].item()) == (ids[0], logprobs[0].item())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which stands for the GPU
@pytest.mark.parametrize("poison", [nan, -inf, inf])
def test_a_row_without_numbers_gives_some_token_and_no_log_probability(device: torch.device, poison: float) -> None:
    rows = [RowParams(), *(RowParams(is_sampled=True, **filters) for filters in FEW)]
    logits = torch.full((len(rows), 200), poison)
    logits[: len(rows) // 2, 100:] = logits[: len(rows) // 2, 100:] if poison == -inf else 1.0
    ids, logprobs = sample(logits, rows, device)
    assert all(0 <= token < 200 for token in ids)
    assert not bool(torch.isfinite(logprobs).any())


def test_the_token_drawn_is_counted_where_its_row_says(device: torch.device) -> None:
    logits = random_logits(3, 97).to(device)
    counts = torch.zeros(4, 97, dtype=torch.int16, device=device)
    counts[2, int(logits[1].argmax())] = 32767
    words = pack([RowParams(), RowParams(), RowParams(is_sampled=True)], device, count_row=[-1, 2, 0])
    ids, _ = draw(logits, survey(logits, 3, words, config=SMALL), words, counts)
    expected = torch.zeros(4, 97, dtype=torch.int16)
    expected[2, ids[1].item()] = 32767   # full
    expected[0, ids[2].item()] = 1
    assert torch.equal(counts.cpu(), expected)


@pytest.mark.parametrize(("vocab_size", "num_ids"), [(97, 0), (97, 1), (97, 60), (1500, 1100)])
def test_a_row_of_counts_is_replaced_whole(device: torch.device, vocab_size: int, num_ids: int) -> None:
    counts = torch.full((3, vocab_size), 9, dtype=torch.int16, device=device)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))[:num_ids]
    numbers = torch.arange(num_ids) + 1
    count_tokens(counts, 1, torch.cat([torch.tensor([5, 5, 5]), ids, numbers]).to(device), 3, num_ids)
    expected = torch.full((3, vocab_size), 9, dtype=torch.int16)
    expected[1] = 0
    expected[1, ids] = numbers.to(torch.int16)
    assert torch.equal(counts.cpu(), expected)


def test_penalties_follow_the_formula_and_leave_other_rows_alone(device: torch.device) -> None:
    vocab_size, eos = 300, 3
    logits = random_logits(5, vocab_size)
    counts = torch.randint(0, 3, (2, vocab_size), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    rows = [RowParams(), RowParams(is_adjusted=True, repetition_penalty=1.5, frequency_penalty=0.25, presence_penalty=0.5),
            RowParams(is_adjusted=True, decay_start=2, decay_factor=1.3), RowParams(is_adjusted=True, min_tokens=9),
            RowParams(is_adjusted=True, decay_start=2, decay_factor=1.3)]
    words = pack(rows, device, [7, 299, 7, eos], index=[5, 5, 5, 7, 5], count_row=[0, 1, -1, -1, -1],
                 allowed_start=[0, 0, 0, 0, 5 * WORDS.value], num_allowed=[0, 0, 0, 0, 4])
    changed = logits.clone().to(device)
    penalize(changed, 5, words, counts.to(device), torch.tensor([eos, -1], device=device), config=PenalizeConfig(block=128, num_warps=1))
    expected = logits.clone()
    seen = counts[1] > 0
    repeated = torch.where(logits[1] > 0, logits[1] / 1.5, logits[1] * 1.5)
    expected[1] = torch.where(seen, repeated - 0.25 * counts[1] - 0.5, logits[1])
    expected[2, eos] += expected[2, eos].abs() * (1.3**3 - 1)
    expected[3, eos] = -inf
    expected[4] = -inf
    expected[4, [7, 299]] = logits[4, [7, 299]]
    expected[4, eos] = logits[4, eos] + logits[4, eos].abs() * (1.3**3 - 1)
    assert torch.allclose(changed.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(changed.cpu()[0], logits[0])


def test_wrong_inputs_are_refused(device: torch.device) -> None:
    logits = torch.zeros(2, 10, device=device)
    with pytest.raises(ValueError, match="3 rows"):
        survey(logits, 3)
    with pytest.raises(ValueError, match="float16"):
        penalize(logits.half(), 2, pack([RowParams()] * 2, device), None, torch.tensor([1], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [102_400, 129_280, 131_072, 151_936])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_large_vocabularies_draw_what_sorting_draws(device: torch.device, vocab_size: int, scale: float) -> None:
    logits = random_logits(len(FILTERS), vocab_size, scale=scale)
    rows = [RowParams(is_sampled=True, seed=seed, **filters) for seed, filters in enumerate(FILTERS)]
    on_device, words = logits.to(device), pack(rows, device)
    ids, _ = draw(on_device, survey(on_device, len(rows), words), words)
    for row, number in enumerate(uniforms(list(range(len(rows))), [0] * len(rows))):
        if rows[row].temperature > 1e30:
            continue
        weights = (logits[row].double() / rows[row].temperature).softmax(-1) * kept_by_sorting(logits[row], rows[row])
        cumulative = weights.cumsum(0) / weights.sum()
        token = int(ids[row])
        low = float(cumulative[token - 1]) if token else 0.0
        assert low - 1e-5 <= float(number) <= float(cumulative[token]) + 1e-5, rows[row]
