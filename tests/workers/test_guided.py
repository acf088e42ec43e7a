"""Guides: what they let through is what the grammar says, wherever a sequence goes on."""

import codecs
import json
import queue
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import InvalidField
from coordinator.sampling import SamplingParams
from coordinator.tokenizer import Tokenizer
from tests.workers.schemas import random_schema
from workers.guided import Grammars, Guide, GuideMaker
from workers.random_tokenizer import EOS_ID, write_tokenizer
from workers.sequence import Sequence
from workers.token_bytes import TokenBytes

VOCAB_SIZE, MODEL_VOCAB = 700, 750  # the model has more rows than the tokenizer has tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, VOCAB_SIZE, 1000)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="module")
def grammars(model_dir: Path) -> Grammars:
    return Grammars(model_dir, MODEL_VOCAB, [EOS_ID])


def allowed(guide: Guide) -> set[int]:
    return {32 * word + bit for word, bits in enumerate(guide.mask().tolist()) for bit in range(32) if bits >> bit & 1}


def babble(guide: Guide, rng: random.Random, limit: int = 2000) -> list[int]:
    """Random tokens out of those allowed, ended where the grammar lets it end now and then."""
    token_ids: list[int] = []
    while not guide.is_finished and len(token_ids) < limit:
        choices = allowed(guide)
        assert choices, "a dead end"
        token_id = EOS_ID if EOS_ID in choices and rng.random() < 0.5 else rng.choice(sorted(choices))
        guide.take(token_id)
        token_ids.append(token_id)
    assert guide.is_finished
    return token_ids


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_is_said_under_a_schema_validates(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    text = tokenizer.decode(babble(grammars.guide("guided_json", json.dumps(schema), []), rng))
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(json.loads(text))


def test_an_empty_schema_means_any_object(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.guide("guided_json", "{}", [])
    assert {tokenizer.decode([token_id])[:1] for token_id in allowed(guide)} == {"{"}
    for token_id in tokenizer.encode('{"a": [1, {"b": null}]}', add_special_tokens=False):
        guide.take(token_id)
    assert guide.is_finished


@pytest.mark.parametrize("expression", [r"[a-c]{2,4}-\d+", r"(yes|no|perhaps)", r"é+x"])
def test_whatever_is_said_under_an_expression_matches_it(grammars: Grammars, tokenizer: Tokenizer, expression: str) -> None:
    for seed in range(10):
        token_ids = babble(grammars.guide("regular_constraint", expression, []), random.Random(seed))
        assert re.fullmatch(expression, tokenizer.decode(token_ids))


def test_whatever_is_said_under_a_grammar_follows_it(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = 'root ::= term ("+" term)*\nterm ::= [0-9] | "(" root ")"'
    for seed in range(10):
        text = tokenizer.decode(babble(grammars.guide("guided_grammar", grammar, []), random.Random(seed)))
        assert isinstance(eval(text), int)


def test_the_end_is_allowed_only_where_the_text_is_complete(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.guide("regular_constraint", "ab?", [])
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    assert EOS_ID not in allowed(guide)
    guide.take(a)
    assert {b, EOS_ID} == allowed(guide) and not guide.is_finished
    guide.take(b)
    assert guide.is_finished, "nothing but the end is left: no step is spent on it"
    other = grammars.guide("regular_constraint", "ab?", [a])
    other.take(EOS_ID)
    assert other.is_finished


def test_a_guide_made_again_from_what_was_said_stands_where_the_first_stands(grammars: Grammars) -> None:
    rng = random.Random(5)
    for _ in range(10):
        schema = json.dumps(random_schema(rng))
        said = babble(grammars.guide("guided_json", schema, []), rng)
        guide = grammars.guide("guided_json", schema, [])
        for index, token_id in enumerate(said[:20]):
            again = grammars.guide("guided_json", schema, said[:index])
            assert again.mask().tolist() == guide.mask().tolist()
            guide.take(token_id)


def test_output_that_does_not_follow_the_grammar_is_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidField, match="regular_constraint: token 300 of the output does not follow"):
        grammars.guide("regular_constraint", "abc", [300])


@pytest.mark.parametrize(("field", "text"), [
    ("guided_grammar", "x ::= y"), ("guided_grammar", 'root ::= "a'), ("guided_grammar", "hello"), ("regular_constraint", "(a"),
    ("regular_constraint", "(?=a)b"), ("guided_json", '{"type": "string", "minLength": 3, "maxLength": 2}'),
    ("guided_json", '{"type": "string", "pattern": "(a"}'),
])
def test_what_does_not_compile_is_refused_by_its_field(grammars: Grammars, field: str, text: str) -> None:
    with pytest.raises(InvalidField) as caught:
        grammars.guide(field, text, [])
    assert caught.value.field == field and "does not compile" in caught.value.reason and ".cc" not in caught.value.reason


def test_a_text_cut_off_anywhere_is_well_formed_up_to_its_last_character(grammars: Grammars, tokenizer: Tokenizer) -> None:
    pieces = TokenBytes(grammars._model_dir, MODEL_VOCAB).pieces
    single = [token_id for token_id, piece in enumerate(pieces) if len(piece) == 1 and piece[0] >= 0x80]
    for field, text in (("regular_constraint", r"[^a]*"), ("guided_json", '{"type": "string", "maxLength": 999}'),
                        ("guided_grammar", "root ::= [^x]*")):
        for seed in range(8):
            rng, guide, said = random.Random(seed), grammars.guide(field, text, []), b""
            for _ in range(200):
                choices = allowed(guide) - {EOS_ID}
                token_id = rng.choice(sorted(choices & set(single)) or sorted(choices))
                guide.take(token_id)
                said += pieces[token_id]
            codecs.getincrementaldecoder("utf-8")().decode(said)


def test_bytes_that_no_text_holds_are_no_tokens(grammars: Grammars) -> None:
    pieces = TokenBytes(grammars._model_dir, MODEL_VOCAB).pieces
    assert {piece[0] for piece in pieces if len(piece) == 1} == {*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)}


def test_special_tokens_and_rows_beyond_the_vocabulary_are_never_allowed(grammars: Grammars) -> None:
    assert allowed(grammars.guide("regular_constraint", r"[\s\S]*", [])) <= {EOS_ID, *range(2, VOCAB_SIZE)}


def test_a_model_without_an_end_token_stops_where_the_grammar_does(model_dir: Path, tokenizer: Tokenizer) -> None:
    guide = Grammars(model_dir, MODEL_VOCAB, []).guide("regular_constraint", "ab", [])
    for token_id in tokenizer.encode("ab", add_special_tokens=False):
        guide.take(token_id)
    assert guide.is_finished


def test_a_grammar_that_allows_nothing_is_refused(grammars: Grammars) -> None:
    for field, text in (("guided_grammar", "root ::= root"), ("guided_json", '{"$ref": "#"}')):
        with pytest.raises(InvalidField, match=f"{field}: allows no token at all"):
            grammars.guide(field, text, [])


def test_a_grammar_that_holds_up_every_sequence_is_given_up(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.guide("regular_constraint", "(" * 6 + "a" + "{1,99})" * 6, [])
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(InvalidField, match="regular_constraint: is too ambiguous"):
        for _ in range(500):
            guide.mask()
            guide.take(a)


def test_a_folder_without_a_tokenizer_cannot_guide(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="guided_json: cannot be kept to"):
        Grammars(tmp_path, 10, [1]).guide("guided_json", "{}", [])


def test_guides_are_made_on_a_thread_in_order_and_errors_told(grammars: Grammars) -> None:
    done: queue.SimpleQueue[tuple[Sequence, Any]] = queue.SimpleQueue()
    maker = GuideMaker(grammars, lambda sequence, error: done.put((sequence, error)))
    made = [Sequence(job_id=text, token_ids=[1], num_prompt=1, params=SamplingParams(regular_constraint=text), max_kv_tokens=1)
            for text in ("a+", "(a", "b+")]
    for sequence in made:
        maker.start(sequence)
    heard = [done.get(timeout=30) for _ in made]
    assert [sequence for sequence, _ in heard] == made
    assert [error is None for _, error in heard] == [sequence.guide is not None for sequence in made] == [True, False, True]
