"""Who computes a step: the contract, and the executor for CPUs.

    launch(n)      the step starts; steps run one after the other in the order of their launch
    result() of n  its tokens, waited for

A step may carry tokens of the one launched just before it, whose result nobody has seen yet (`ForwardBatch.carried`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from coordinator.sampling import SamplingParams
from workers.batch import ForwardBatch
from workers.cpu_threads import CpuThreads
from workers.kv_cache import KVCache
from workers.model_runner import ModelRunner
from workers.sampler import Sampler
from workers.sequence import Sequence


class Flight(Protocol):
    """A launched step."""

    def result(self) -> tuple[list[int], list[float]]:
        """Waits for this step. Token ids and their log probabilities, one per sampled sequence. Called once, in order of launch."""
        ...


class Executor(Protocol):
    """A loaded model with its KV pool and its sampler.

    `depth` 1: a step's result is taken before the next step is scheduled; 2: one step runs while the next is prepared and launched.
    """

    depth: int

    @property
    def kv_cache(self) -> KVCache: ...

    def launch(self, batch: ForwardBatch, sampled: list[Sequence]) -> Flight:
        """Start a step and draw the next token of `sampled`, in the order of batch.logit_rows. Both are read before this returns."""
        ...

    def follow(self, batch: ForwardBatch) -> None:
        """A step that another rank launched: compute this rank's share of it. Nothing is drawn here."""
        ...

    def warm_up(self) -> None:
        """Set up all that serving needs, so that no request pays for it. Before any launch; overwrites pages."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was computed in its launch."""

    token_ids: list[int]
    logprobs: list[float]

    def result(self) -> tuple[list[int], list[float]]:
        return self.token_ids, self.logprobs


class EagerExecutor:
    """Computes in `launch`. A depth of 2 hides nothing here; tests use it to see the same tokens as with 1."""

    def __init__(self, runner: ModelRunner, sampler: Sampler, depth: int = 1, threads: CpuThreads | None = None) -> None:
        self.depth = depth
        self._runner = runner
        self._sampler = sampler
        self._threads = threads
        self._last_ids: list[int] = []  # drawn by the launch before

    @property
    def kv_cache(self) -> KVCache:
        return self._runner.kv_cache

    def launch(self, batch: ForwardBatch, sampled: list[Sequence]) -> Done:
        if self._threads is not None:
            self._threads.choose(len(batch.token_ids))
        self._fill_in(batch)
        newest = {sequence: self._last_ids[sequence.sample_row] for sequence in sampled if sequence.num_in_flight}
        token_ids, logprobs = self._sampler.sample(self._runner.forward(batch), sampled, newest)
        self._last_ids = token_ids
        return Done(token_ids, logprobs)

    def follow(self, batch: ForwardBatch) -> None:
        assert self.depth == 1, "the tokens of a step under way are known to the leader only"
        if self._threads is not None:
            self._threads.choose(len(batch.token_ids))
        self._runner.forward(batch)

    def _fill_in(self, batch: ForwardBatch) -> None:
        """Carried tokens into the batch."""
        at = 0
        for row, count in zip(batch.carried, batch.query_lens, strict=False):  # an empty list carries nothing
            if row >= 0:
                batch.token_ids[at] = self._last_ids[row]
            at += count

    def warm_up(self) -> None:
        """Every operation once. Leaves nothing behind but page 0's bytes."""
        self._runner.warmup()
        params = SamplingParams(do_sample=True, seed=1, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, input_penalty=True)
        sequences = [Sequence(job_id="warm-up", token_ids=[0], num_prompt=1, params=p, max_kv_tokens=1) for p in (SamplingParams(), params)]
        self._sampler.sample(torch.randn(len(sequences), self._runner.config.vocab_size, device=self._runner.device), sequences)
