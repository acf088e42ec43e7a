"""The model runner gives transformers' tokens, however the scheduler cuts, mixes and places the sequences."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from workers.batch import ForwardBatch
from workers.model_runner import ModelRunner
from workers.random_model import KINDS, Overrides, write_random_model

PAGE_SIZE = 8
NUM_PAGES = 256
NEW_TOKENS = 64


@dataclass
class Pair:
    """One checkpoint in our runner and in transformers."""

    runner: ModelRunner
    oracle: Any
    path: Path

    def oracle_greedy(self, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return out[0, len(prompt) :].tolist()

    def oracle_logits(self, token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.oracle(torch.tensor([token_ids])).logits[0]


@dataclass
class Seq:
    """A sequence as the scheduler keeps it: tokens so far, how many are computed, its pages."""

    token_ids: list[int]
    pages: list[int]
    num_computed: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


def load_pair(path: Path, dtype: torch.dtype = torch.float32) -> Pair:
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    oracle.generation_config.eos_token_id = None
    return Pair(ModelRunner(path, "cpu", dtype, NUM_PAGES, PAGE_SIZE, load_workers=2), oracle, path)


@pytest.fixture(scope="module", params=sorted(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield load_pair(write_random_model(tmp_path_factory.mktemp("model"), request.param, seed=7))


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(2, 512), k=length)


def run_step(runner: ModelRunner, chunks: list[tuple[Seq, int]]) -> None:
    """One forward pass over the next tokens of some sequences; those that have no more pending tokens get their greedy next one."""
    batch = ForwardBatch([], [], [], [], [], [], [])
    finished = []
    for seq, count in chunks:
        start, end = seq.num_computed, seq.num_computed + count
        batch.token_ids += seq.token_ids[start:end]
        batch.positions += range(start, end)
        batch.slot_mapping += [seq.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
        batch.query_lens.append(count)
        batch.seq_lens.append(end)
        batch.page_tables.append(seq.pages)
        seq.num_computed = end
        if not seq.num_pending:
            batch.logit_rows.append(len(batch.token_ids) - 1)
            finished.append(seq)
    logits = runner.forward(batch)
    assert logits.dtype == torch.float32 and logits.shape == (len(finished), runner.config.vocab_size)
    for seq, token in zip(finished, logits.argmax(-1).tolist(), strict=True):
        seq.token_ids.append(token)
        seq.output.append(token)


def greedy(runner: ModelRunner, seq: Seq, chunk: int | None = None, count: int = NEW_TOKENS) -> list[int]:
    while len(seq.output) < count:
        run_step(runner, [(seq, min(seq.num_pending, chunk or seq.num_pending))])
    return seq.output


def scattered_pages(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(NUM_PAGES), -(-num_tokens // PAGE_SIZE))


def test_whole_prompt_gives_the_tokens_of_transformers(pair: Pair) -> None:
    prompt = make_prompt(37)
    assert greedy(pair.runner, Seq(list(prompt), list(range(3, 20)))) == pair.oracle_greedy(prompt)


@pytest.mark.parametrize("chunk", [1, 5, 13, 30])
def test_chunked_prefill_gives_the_same_tokens(pair: Pair, chunk: int) -> None:
    prompt = make_prompt(61)
    assert greedy(pair.runner, Seq(list(prompt), list(range(100, 120))), chunk) == pair.oracle_greedy(prompt)


def test_scattered_pages_give_the_same_tokens(pair: Pair) -> None:
    prompt = make_prompt(70)
    assert greedy(pair.runner, Seq(list(prompt), scattered_pages(140)), 23) == pair.oracle_greedy(prompt)


def test_a_prompt_of_one_token_works(pair: Pair) -> None:
    assert greedy(pair.runner, Seq([5], [9, 2]), count=12) == pair.oracle_greedy([5], 12)


def test_prefills_and_decodes_of_eight_lengths_share_forward_passes(pair: Pair) -> None:
    rng = random.Random(1)
    pages = rng.sample(range(NUM_PAGES), NUM_PAGES)
    lengths = [1, 3, 8, 17, 40, 64, 97, 160]
    waiting = []
    for length in lengths:
        needed = -(-(length + NEW_TOKENS) // PAGE_SIZE)
        waiting.append(Seq(make_prompt(length), [pages.pop() for _ in range(needed)]))
    expected = {id(seq): pair.oracle_greedy(list(seq.token_ids)) for seq in waiting}
    all_seqs, running, saw_mixed = list(waiting), [], False
    while any(len(seq.output) < NEW_TOKENS for seq in all_seqs):
        if waiting and rng.random() < 0.3:
            running.append(waiting.pop(rng.randrange(len(waiting))))
        running = [seq for seq in running if len(seq.output) < NEW_TOKENS]
        if not running:
            continue
        rng.shuffle(running)  # prefills stand in any place
        counts = [min(seq.num_pending, rng.choice([1, 7, 19])) for seq in running]
        saw_mixed = saw_mixed or (min(counts) == 1 and max(counts) > 1)
        run_step(pair.runner, list(zip(running, counts, strict=True)))
    assert saw_mixed
    for seq in all_seqs:
        assert seq.output == expected[id(seq)]


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 89), max_size=4), seed=st.integers(0, 1000))
def test_logits_of_every_token_are_those_of_transformers(pair: Pair, cuts: list[int], seed: int) -> None:
    token_ids = make_prompt(90, seed)
    expected = pair.oracle_logits(token_ids)
    pages = scattered_pages(90, seed)
    borders = sorted({0, *cuts, 90})
    for start, end in pairwise(borders):
        slots = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
        count = end - start
        batch = ForwardBatch(token_ids[start:end], list(range(start, end)), slots, [count], [end], [pages], list(range(count)))
        logits = pair.runner.forward(batch)
        torch.testing.assert_close(logits, expected[start:end], atol=1e-4, rtol=0)


def test_no_wanted_row_gives_no_logits(pair: Pair) -> None:
    logits = pair.runner.forward(ForwardBatch([5, 6, 7], [0, 1, 2], [0, 1, 2], [3], [3], [[0]], []))
    assert logits.shape == (0, pair.runner.config.vocab_size)


def test_leftovers_in_reused_pages_never_matter(pair: Pair) -> None:
    cache = pair.runner.kv_cache
    for layer in cache.layers:
        layer.fill_(float("nan"))
    try:
        prompts = [make_prompt(length) for length in (3, 21)]
        seqs = [Seq(list(prompt), list(range(20 * i, 20 * i + 12))) for i, prompt in enumerate(prompts)]
        for _ in range(10):
            run_step(pair.runner, [(seq, seq.num_pending) for seq in seqs])
        assert [seq.output for seq in seqs] == [pair.oracle_greedy(prompt, 10) for prompt in prompts]
    finally:
        for layer in cache.layers:
            layer.zero_()


DECODE_ELSEWHERE = """
import json, sys
from pathlib import Path
from coordinator.messages import KVLayout
from workers.batch import ForwardBatch
from workers.kv_cache import KVCache
from workers.model_runner import ModelRunner
import torch

job = json.loads(sys.stdin.read())
runner = ModelRunner(Path(job["model_dir"]), "cpu", torch.float32, 40, 8)
source = KVCache.attach(job["address"], job["num_pages"], KVLayout(**job["layout"]))
pages = list(range(39, 10, -1))
tokens = job["token_ids"]
runner.kv_cache.copy_pages_from(source, job["pages"], pages, len(tokens) - 1)
del source
output = []
while len(output) < job["count"]:
    at = len(tokens) - 1
    batch = ForwardBatch(tokens[at:], [at], [pages[at // 8] * 8 + at % 8], [1], [at + 1], [pages], [0])
    tokens.append(int(runner.forward(batch).argmax()))
    output.append(tokens[-1])
print(json.dumps(output))
"""


def test_another_process_decodes_from_copied_pages(pair: Pair) -> None:
    prompt = make_prompt(45)
    expected = pair.oracle_greedy(prompt)
    seq = Seq(list(prompt), scattered_pages(48, seed=3))
    first = greedy(pair.runner, seq, count=1)
    layout = pair.runner.kv_cache.layout("m")
    job = {
        "model_dir": str(pair.path), "address": pair.runner.kv_cache.address, "num_pages": NUM_PAGES, "pages": seq.pages,
        "layout": {name: getattr(layout, name) for name in layout.__slots__}, "token_ids": seq.token_ids, "count": NEW_TOKENS - 1,
    }
    done = subprocess.run([sys.executable, "-c", DECODE_ELSEWHERE], input=json.dumps(job), capture_output=True, text=True, check=True)
    assert first + json.loads(done.stdout) == expected


def test_bfloat16_stays_near_float32(pair: Pair) -> None:
    runner = ModelRunner(pair.path, "cpu", torch.bfloat16, NUM_PAGES, PAGE_SIZE)
    token_ids = make_prompt(40)
    expected = pair.oracle_logits(token_ids)
    rows = list(range(39))
    pages = scattered_pages(40)
    slots = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(40)]
    prefill = runner.forward(ForwardBatch(token_ids[:39], rows, slots[:39], [39], [39], [pages], rows))
    decode = runner.forward(ForwardBatch(token_ids[39:], [39], slots[39:], [1], [40], [pages], [0]))
    error = (torch.cat((prefill, decode)) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A router's near tie may send single tokens to another expert: those differ more, the rest by rounding only.
    assert error.median() < 0.05 and error[-1] < 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints_computed_in_float32_match(tmp_path: Path, dtype: str) -> None:
    pair = load_pair(write_random_model(tmp_path, "llama", Overrides(tied=True, heads=6, kv_heads=3, hidden=96), dtype=dtype))
    prompt = make_prompt(33)
    assert greedy(pair.runner, Seq(list(prompt), list(range(20)))) == pair.oracle_greedy(prompt)


@pytest.mark.parametrize(
    ("like", "changes"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}),
        ("llama", {"rope_scaling": None, "tie_word_embeddings": True}),
        ("qwen2", {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
        ("deepseek-v2", {"attention_bias": True}),
        ("deepseek-v2-lite", {"attention_bias": True, "n_shared_experts": 1}),
        ("deepseek-v3", {"attention_bias": True, "rope_interleave": False, "norm_topk_prob": False}),
        ("deepseek-v3", {"q_lora_rank": None, "rope_scaling": None, "first_k_dense_replace": 0}),
    ],
)
def test_checkpoints_saved_by_transformers_are_read(tmp_path: Path, like: str, changes: dict[str, Any]) -> None:
    """Its config spelling (rope_parameters, dtype) and its tensor names, with features that the small kinds lack."""
    source = write_random_model(tmp_path / "source", like)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").unlink()
    oracle = AutoModelForCausalLM.from_config(_auto_config(source)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in oracle.parameters():
            std = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, std, generator=generator)
    oracle.save_pretrained(tmp_path / "saved")
    pair = load_pair(tmp_path / "saved")
    token_ids = make_prompt(80)
    pages = scattered_pages(80)
    rows = list(range(80))
    slots = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in rows]
    logits = pair.runner.forward(ForwardBatch(token_ids, rows, slots, [80], [80], [pages], rows))
    torch.testing.assert_close(logits, pair.oracle_logits(token_ids), atol=2e-4, rtol=0)


def _auto_config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def test_warmup_leaves_the_results_alone(pair: Pair) -> None:
    prompt = make_prompt(12)
    pair.runner.warmup()
    assert greedy(pair.runner, Seq(list(prompt), [0, 1, 2, 3]), count=8) == pair.oracle_greedy(prompt, 8)
