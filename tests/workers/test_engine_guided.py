"""Constraints, biases and likeliest tokens through real engine processes: alone, handed over, overlapped, resumed."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import LlamaForCausalLM

from coordinator.tokenizer import Tokenizer
from tests.workers.schemas import random_schema
from tests.workers.test_engine import VOCAB_SIZE, Answer, EngineProcess, add, assert_same, greedy, hand_over, prompt_of, running
from workers.engine_messages import Cancel, Failed
from workers.random_model import write_random_model

NUM_SCHEMAS = 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def engines(model_dir: Path) -> Iterator[dict[str, EngineProcess]]:
    with running(model_dir, depth=1) as started:
        yield started


@pytest.fixture(scope="module")
def overlapped(model_dir: Path) -> Iterator[dict[str, EngineProcess]]:
    with running(model_dir, depth=2) as started:
        yield started


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


def guided(schema: dict[str, Any], **params: Any) -> dict[str, Any]:
    return {"guided_json": json.dumps(schema), "ignore_eos": False, "max_new_tokens": 500, "do_sample": True, "seed": 1, **params}


def test_guided_answers_validate_and_are_the_same_alone_handed_over_overlapped_and_resumed(
        engines: dict[str, EngineProcess], overlapped: dict[str, EngineProcess], tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for number in range(NUM_SCHEMAS):
        schema, prompt = random_schema(rng, depth=1), prompt_of(20, seed=number)
        params = guided(schema, seed=number, do_sample=number % 3 > 0)
        alone, = engines["both"].generate(prompt, **params)
        assert alone.finish == "stop"
        jsonschema.validate(json.loads(tokenizer.decode(alone.token_ids)), schema)
        assert_same(hand_over(engines, add(prompt, **params), prompt), alone)
        assert_same(hand_over(overlapped, add(prompt, **params), prompt), alone)
        known = rng.randrange(1, len(alone.token_ids)) if len(alone.token_ids) > 1 else 0
        rest = add(prompt + alone.token_ids[:known], num_prompt=len(prompt), **params)
        overlapped["both"].answers[rest.job_id] = Answer(token_ids=alone.token_ids[:known], logprobs=alone.logprobs[:known])
        overlapped["both"].send(rest)
        resumed, = overlapped["both"].wait_for_finish(rest.job_id)
        assert_same(resumed, alone)
    for engine in (*engines.values(), *overlapped.values()):
        engine.wait_until_nothing_is_held()


def test_guided_and_free_sequences_share_steps_without_a_trace(overlapped: dict[str, EngineProcess], tokenizer: Tokenizer) -> None:
    engine, schema = overlapped["both"], {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}}, "required": ["a"]}
    kinds = [guided(schema), {"max_new_tokens": 40}, guided(schema, seed=7), {"max_new_tokens": 40, "do_sample": True, "seed": 3}]
    prompts = [prompt_of(10 + i, seed=50 + i) for i in range(len(kinds))]
    alone = [engine.generate(prompt, **params)[0] for prompt, params in zip(prompts, kinds, strict=True)]
    jobs = [add(prompt, **params) for prompt, params in zip(prompts, kinds, strict=True)]
    engine.send(*jobs)
    for answer, expected in zip(engine.wait_for_finish(*(job.job_id for job in jobs)), alone, strict=True):
        assert_same(answer, expected)


@pytest.mark.parametrize(("field", "text"), [("guided_grammar", "root ::= ("), ("regular_constraint", "(a"),
                                             ("guided_json", '{"type": "string", "pattern": "("}')])
@pytest.mark.parametrize("role", ["both", "prefill"])
def test_a_grammar_that_does_not_compile_fails_its_job_alone(engines: dict[str, EngineProcess], role: str, field: str, text: str) -> None:
    engine = engines[role]
    job = add([5, 6], ignore_eos=False, **{field: text})
    engine.send(job)
    failed = engine.wait_for(Failed, job.job_id)
    assert failed.field == field and failed.error.startswith("does not compile")
    if role == "both":
        engine.wait_until_nothing_is_held()


def test_a_job_cancelled_or_replaced_while_its_grammar_is_compiled_is_run_as_last_asked(engines: dict[str, EngineProcess]) -> None:
    engine = engines["both"]
    gone, other = (add([5, 6], ignore_eos=False, regular_constraint=f"[a-z]{{{count}}}") for count in (101, 102))
    engine.send(gone, Cancel(job_id=gone.job_id), other)
    answer, = engine.wait_for_finish(other.job_id)
    assert answer.token_ids and gone.job_id not in engine.answers
    replaced = add([5, 6], ignore_eos=False, regular_constraint="[0-9]{103}", max_new_tokens=7)
    anew = add([5, 6], max_new_tokens=3)
    engine.replace(replaced, type(anew)(job_id=replaced.job_id, token_ids=anew.token_ids, num_prompt=2, params=anew.params))
    answer, = engine.wait_for_finish(replaced.job_id)
    assert len(answer.token_ids) == 3
    engine.wait_until_nothing_is_held()


def test_the_likeliest_tokens_equal_those_of_transformers_and_survive_a_hand_over(
        engines: dict[str, EngineProcess], overlapped: dict[str, EngineProcess], model_dir: Path) -> None:
    oracle = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompt = prompt_of(30, seed=9)
    alone, = engines["both"].generate(prompt, top_logprobs=6)
    assert_same(alone, greedy(oracle, prompt))
    with torch.inference_mode():
        logprobs = oracle(torch.tensor([prompt + alone.token_ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    for row, top in enumerate(alone.tops):
        expected = logprobs[row].topk(6)
        assert top is not None and [token_id for token_id, _ in top] == expected.indices.tolist()
        assert [logprob for _, logprob in top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    apart, together = add(prompt, top_logprobs=6), overlapped["both"].generate(prompt, prompt, top_logprobs=6)
    hand_over(engines, apart, prompt)
    handed_over = [top for role in ("prefill", "decode") for top in engines[role].answers[apart.job_id].tops]
    for tops in (handed_over, *(answer.tops for answer in together)):
        assert [[token_id for token_id, _ in top or ()] for top in tops] == [[token_id for token_id, _ in top or ()] for top in alone.tops]
    assert engines["both"].generate(prompt)[0].tops == [None] * 12


def test_a_bias_steers_and_is_checked_against_the_vocabulary(engines: dict[str, EngineProcess]) -> None:
    answer, = engines["both"].generate([5, 6, 7], logit_bias=((77, 100.0),), max_new_tokens=4)
    assert answer.token_ids == [77] * 4
    job = add([5, 6], logit_bias=((VOCAB_SIZE, 1.0),))
    engines["both"].send(job)
    assert engines["both"].wait_for(Failed, job.job_id).field == "logit_bias"
