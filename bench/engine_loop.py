"""The engine's loop without a channel at its end: schedule, launch, collect, complete, for sequences that a measurement makes up."""

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from coordinator.messages import KVLayout
from coordinator.sampling import SamplingParams
from workers.batch import ForwardBatch
from workers.engine_messages import Tokens
from workers.model_config import ModelConfig
from workers.scheduler import Scheduler
from workers.sequence import ImportSource, Sequence, num_pages_for
from workers.step import SchedulerSettings, Step


class Flight(Protocol):
    """A step under way on the device."""

    def result(self) -> tuple[list[int], list[float]]:
        """Waits for the drawn token ids and their log probabilities, in the order of the sampled sequences."""
        ...


class Executor(Protocol):
    """Runs steps on a device, `depth` of them at a time."""

    depth: int

    def launch(self, batch: ForwardBatch, sampled: list[Sequence], /) -> Flight: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One step as it came back: when its tokens were there, how many tokens it ran and how many it drew."""

    at_s: float
    num_tokens: int
    num_drawn: int


class EngineLoop:
    """Made-up sequences through a real scheduler and executor. `around_launch` is called just before and just after each launch."""

    def __init__(self, executor: Executor, settings: SchedulerSettings, around_launch: Callable[[], object] = lambda: None) -> None:
        self.scheduler = Scheduler(settings)
        self.turns: list[Turn] = []
        self._executor = executor
        self._around_launch = around_launch
        self._flights: deque[tuple[Step, Flight]] = deque()

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def admit_imported(self) -> None:
        """Sequences with a source go straight on to decode: their pages count as copied, whatever is in them."""
        step = self.scheduler.schedule()
        assert not step.chunks, "only imported sequences may be waiting"
        for copy in step.copies:
            self.scheduler.finish_copy(copy)
            self.scheduler.activate(copy.sequence.job_id)

    def run(self, num_turns: int) -> list[Turn]:
        """Until so many more steps came back; those still under way come back with the next call."""
        wanted = len(self.turns) + num_turns
        while len(self.turns) < wanted and self._turn():
            pass
        return self.turns[wanted - num_turns :]

    def run_to_the_end(self) -> list[Turn]:
        started = len(self.turns)
        while self._turn():
            pass
        return self.turns[started:]

    def _turn(self) -> bool:
        """False when there is nothing left to run."""
        step = self.scheduler.schedule()
        if step.chunks:
            batch = self.scheduler.batch(step)
            self._around_launch()
            flight = self._executor.launch(batch, step.sampled)
            self._around_launch()
            self.scheduler.advance(step)
            self._flights.append((step, flight))
        if self._flights and (not step.chunks or len(self._flights) >= self._executor.depth):
            self._collect()
        return bool(step.chunks or self._flights)

    def _collect(self) -> None:
        step, flight = self._flights.popleft()
        token_ids, logprobs = flight.result()
        at_s = time.perf_counter()
        events = self.scheduler.complete(step, token_ids, logprobs)
        drawn = sum(len(event.rows) for event in events if isinstance(event, Tokens))
        self.turns.append(Turn(at_s, sum(step.chunks.values()), drawn))


class Prompts:
    """Sequences of random tokens, no two alike."""

    def __init__(self, config: ModelConfig, page_size: int, *, is_greedy: bool = False, seed: int = 0) -> None:
        self._config = config
        self._page_size = page_size
        self._is_greedy = is_greedy
        self._draw = random.Random(seed)
        self._num_made = 0

    def fresh(self, count: int, prompt_len: int, max_new_tokens: int) -> list[Sequence]:
        """To be prefilled."""
        return [self._sequence(prompt_len, max_new_tokens) for _ in range(count)]

    def imported(self, count: int, context: int, max_new_tokens: int) -> list[Sequence]:
        """To be decoded from `context` tokens on, as after a hand-over."""
        sequences = self.fresh(count, context, max_new_tokens)
        pages = tuple(range(num_pages_for(context - 1, self._page_size)))
        layout = KVLayout(model="", weights="", kind=self._config.kv_kind, num_layers=self._config.num_layers, row=self._config.kv_row,
                          dtype="bfloat16", page_size=self._page_size)
        for sequence in sequences:
            sequence.source = ImportSource(ranks=(), num_pages=len(pages), page_ids=pages, num_tokens=context - 1, layout=layout)
        return sequences

    def _sequence(self, prompt_len: int, max_new_tokens: int) -> Sequence:
        self._num_made += 1
        params = SamplingParams(do_sample=not self._is_greedy, seed=self._num_made, ignore_eos=True, max_new_tokens=max_new_tokens)
        token_ids = self._draw.choices(range(self._config.vocab_size), k=prompt_len)
        return Sequence(job_id=f"bench-{self._num_made}", token_ids=token_ids, num_prompt=prompt_len, params=params,
                        max_kv_tokens=prompt_len + max_new_tokens - 1)
