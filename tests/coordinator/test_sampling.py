"""Sampling parameters: LightLLM's ranges, and errors that name the field."""

import pytest

from coordinator.errors import InvalidField
from coordinator.sampling import DEFAULTS, SamplingParams


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "1"), ("temperature", True),
    ("top_p", 0.0), ("top_p", 1.01), ("top_k", 0), ("top_k", -2), ("top_k", 1.5),
    ("presence_penalty", -2.1), ("frequency_penalty", -3), ("repetition_penalty", 0.9),
    ("max_new_tokens", 0), ("max_new_tokens", 1.0), ("min_new_tokens", 0), ("best_of", 9), ("n", 0),
    ("do_sample", 1), ("ignore_eos", "true"), ("seed", -1), ("seed", 2**64),
    ("exponential_decay_length_penalty", [1]), ("exponential_decay_length_penalty", [-1, 1.0]),
    ("exponential_decay_length_penalty", [1, 0.5]),
    ("stop_sequences", [""]), ("stop_sequences", 5), ("stop_sequences", ["x"] * 11), ("stop_sequences", [[1, -2]]),
    ("allowed_token_ids", list(range(257))), ("allowed_token_ids", [True]), ("allowed_token_ids", "1"),
    ("max_tokens", 5), ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", True),
    ("logit_bias", {"5": 101}), ("logit_bias", {"5": "1"}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", [5, 6]),
    ("logit_bias", {"5": 1, 5: 2}), ("logit_bias", {i: 0 for i in range(1025)}), ("logit_bias", 3),
    ("guided_json", "{"), ("guided_json", "[]"), ("guided_json", 5), ("guided_json", '{"type": "strin"}'), ("guided_json", "NaN"),
    ("guided_grammar", 5), ("guided_grammar", "(" * 65), ("regular_constraint", "(" * 65), ("regular_constraint", "a" * 65_537),
])
def test_a_bad_parameter_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(InvalidField) as caught:
        SamplingParams.parse({field: value})
    assert caught.value.field == field


def test_null_means_the_default_and_an_empty_constraint_is_none() -> None:
    assert SamplingParams.parse(dict.fromkeys(DEFAULTS)) == SamplingParams()
    assert SamplingParams.parse({"guided_json": "", "guided_grammar": None}) == SamplingParams()


def test_n_and_best_of_follow_each_other_and_must_agree() -> None:
    assert SamplingParams.parse({"best_of": 3}).n == 3
    assert SamplingParams.parse({"n": 2}).best_of == 2
    with pytest.raises(InvalidField, match="n: must equal best_of"):
        SamplingParams.parse({"n": 2, "best_of": 3})


def test_min_new_tokens_may_not_exceed_max_new_tokens() -> None:
    with pytest.raises(InvalidField) as caught:
        SamplingParams.parse({"min_new_tokens": 20})  # max_new_tokens is 16 by default
    assert caught.value.field == "min_new_tokens"


def test_defaults_of_a_model_fill_in_what_the_user_left_out() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.95, do_sample=True)
    params = SamplingParams.parse({"top_p": 0.5}, defaults)
    assert (params.temperature, params.top_p, params.do_sample) == (0.6, 0.5, True)


def test_the_wire_form_carries_what_differs_and_parses_to_the_same() -> None:
    params = SamplingParams.parse({"stop_sequences": ["\n", [5, 6]], "seed": 7, "max_new_tokens": 3})
    assert set(params.to_wire()) == {"stop_sequences", "seed", "max_new_tokens"}
    assert SamplingParams.parse(params.to_wire()) == params
    assert params.stop_strings == ("\n",) and params.stop_token_runs == ((5, 6),)


def test_biases_come_as_a_map_with_ids_or_their_digits_or_as_pairs() -> None:
    expected = ((5, 1.5), (70, -100.0))
    for given in ({"70": -100, "5": 1.5}, {70: -100, 5: 1.5}, [[70, -100], [5, 1.5]], expected):
        assert SamplingParams.parse({"logit_bias": given}).logit_bias == expected
    params = SamplingParams(logit_bias=expected, top_logprobs=3)
    assert SamplingParams.parse(params.to_wire()) == params


def test_a_schema_may_come_as_an_object_and_travels_as_text() -> None:
    params = SamplingParams.parse({"guided_json": {"type": "object", "properties": {"a": {"type": "null"}}}})
    assert params.constraint == ("guided_json", '{"type": "object", "properties": {"a": {"type": "null"}}}') and params.is_guided
    assert SamplingParams.parse(params.to_wire()) == params
    assert not SamplingParams().is_guided and SamplingParams().constraint is None


@pytest.mark.parametrize(("given", "field"), [
    ({"guided_json": "{}", "regular_constraint": "a"}, "regular_constraint"),
    ({"guided_grammar": 'root ::= "a"', "regular_constraint": "a"}, "regular_constraint"),
    ({"regular_constraint": "a", "ignore_eos": True}, "ignore_eos"),
    ({"regular_constraint": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"regular_constraint": "a", "min_new_tokens": 2}, "min_new_tokens"),
])
def test_what_contradicts_a_constraint_is_refused(given: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        SamplingParams.parse(given)
    assert caught.value.field == field
