"""A model of a few lines with a real paged memory: the next token is a hash of all tokens that its pages hold.

Whoever reads a page that was not written, or that others wrote since, draws another token than `expected_output` says.
"""

import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from coordinator.sampling import SamplingParams
from workers.batch import ForwardBatch
from workers.executor import EagerExecutor
from workers.sequence import Sequence

EOS, VOCAB_SIZE = 6, 7
PAGE_SIZE = 2

Context = tuple[int, ...]


def next_token(context: Context) -> int:
    return zlib.crc32(bytes(context)) % VOCAB_SIZE


def logprob_of(token_id: int) -> float:
    return -1.0 - token_id


def expected_output(prompt: list[int], params: SamplingParams) -> list[tuple[int, str | None]]:
    """(token, finish) of each output token, worked out without an engine."""
    tokens: list[int] = []
    while True:
        tokens.append(next_token((*prompt, *tokens)))
        is_stop = any(tuple(tokens[-len(run):]) == run for run in params.stop_token_runs)
        is_stop = is_stop or (tokens[-1] == EOS and not params.ignore_eos)
        if is_stop or len(tokens) == params.max_new_tokens:
            return [(token, None) for token in tokens[:-1]] + [(tokens[-1], "stop" if is_stop else "length")]


class PagedRunner:
    """In a model runner's place. Its logits are the contexts themselves."""

    def __init__(self) -> None:
        self.kv_cache = SimpleNamespace(device=torch.device("cpu"))
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> (position, token)

    def forward(self, batch: ForwardBatch) -> list[Context]:
        assert len(batch.token_ids) == len(batch.positions) == len(batch.slot_mapping) == sum(batch.query_lens)
        for slot, position, token in zip(batch.slot_mapping, batch.positions, batch.token_ids, strict=True):
            self.slots[slot] = position, token
        contexts, row = [], -1
        for count, length, pages in zip(batch.query_lens, batch.seq_lens, batch.page_tables, strict=True):
            row += count
            if row in batch.logit_rows:
                held = [self.slots[pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE] for i in range(length)]
                assert [position for position, _ in held] == list(range(length)), "a page of another place in a sequence"
                contexts.append(tuple(token for _, token in held))
        return contexts


class ContextSampler:
    """In a sampler's place; checks that sequences know as many tokens as the model has seen of them."""

    def sample(self, contexts: list[Context], sequences: list[Sequence], newest: Mapping[Sequence, int]) -> tuple[list[int], list[float]]:
        for context, sequence in zip(contexts, sequences, strict=True):
            carried = [newest[sequence]] if sequence in newest else []
            assert list(context) == sequence.token_ids + carried and sequence.num_output == len(context) - sequence.num_prompt
        token_ids = [next_token(context) for context in contexts]
        return token_ids, [logprob_of(token) for token in token_ids]


def eager_executor(depth: int) -> EagerExecutor:
    return EagerExecutor(PagedRunner(), ContextSampler(), depth)  # type: ignore[arg-type]


@dataclass
class LateFlight:
    executor: "LateExecutor"
    found: tuple[list[int], list[float]] | None = None

    def result(self) -> tuple[list[int], list[float]]:
        while self.found is None:
            self.executor.run_next()
        return self.found


class LateExecutor:
    """As a GPU does it: launches are only noted, and run when a result is waited for. Depth 2."""

    depth = 2

    def __init__(self) -> None:
        self._runner = PagedRunner()
        self.kv_cache: Any = self._runner.kv_cache
        self._queue: deque[tuple[ForwardBatch, list[list[int]], LateFlight]] = deque()
        self._last_ids: list[int] = []

    def launch(self, batch: ForwardBatch, sampled: list[Sequence]) -> LateFlight:
        assert len(self._queue) < self.depth and len(batch.carried) == len(batch.query_lens) and len(sampled) == len(batch.logit_rows)
        copied = {name: list(value) if isinstance(value := getattr(batch, name), list) else value for name in batch.__slots__}
        copied["page_tables"] = [list(pages) for pages in batch.page_tables]
        flight = LateFlight(self)
        self._queue.append((ForwardBatch(**copied), batch.page_tables, flight))
        return flight

    def run_next(self) -> None:
        batch, page_tables, flight = self._queue.popleft()
        for then, now in zip(batch.page_tables, page_tables, strict=True):
            assert now[:len(then)] == then, "a page table that was launched may only grow"
        for index, row in enumerate(batch.carried):
            if row >= 0:
                assert batch.query_lens[index] == 1
                batch.token_ids[sum(batch.query_lens[:index])] = self._last_ids[row]
        self._last_ids = [next_token(context) for context in self._runner.forward(batch)]
        flight.found = self._last_ids, [logprob_of(token) for token in self._last_ids]

    def warm_up(self) -> None:
        pass
