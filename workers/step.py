"""What the scheduler is told and what it decides: its settings, one step, and the pages to fetch for an import. Decides nothing itself."""

from dataclasses import dataclass, field
from typing import Literal

from workers.engine_messages import Imported, Prefilled
from workers.sequence import ImportSource, Sequence

Role = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """`chunk_size` bounds one sequence's prefill tokens in a step, `max_batch_tokens` all tokens of a step, `depth` the steps that are
    launched and not completed when `schedule` returns, its own included. `background_tokens` bounds those of background sequences in a
    step where nobody else runs; 0: no bound there."""

    role: Role = "both"
    num_pages: int
    page_size: int
    chunk_size: int
    max_batch_tokens: int
    max_num_seqs: int
    eos_ids: frozenset[int] = frozenset()
    prefix_cache: bool = True
    depth: int = 1
    background_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.num_pages > 0 and self.page_size > 0 and self.chunk_size > 0 and self.max_num_seqs > 0
        assert self.depth in (1, 2), "a token is carried from the step just before"
        assert self.max_batch_tokens > self.max_num_seqs, "a step must hold every running sequence and at least one token of prefill"


@dataclass(slots=True, eq=False, kw_only=True)
class PageCopy:
    """Pages to fetch for one import. The destination pages stay taken until `finish_copy`, also when the sequence was cancelled."""

    sequence: Sequence
    source: ImportSource
    src_pages: list[int]
    dst_pages: list[int]
    num_tokens: int
    is_cancelled: bool = False


@dataclass(slots=True, kw_only=True)
class Step:
    """One forward pass: how many tokens each sequence runs, and those whose next token is drawn, in the order of the logit rows."""

    chunks: dict[Sequence, int] = field(default_factory=dict)
    sampled: list[Sequence] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    imported: list[Imported] = field(default_factory=list)
    prefilled: list[tuple[Sequence, Prefilled]] = field(default_factory=list)  # prompts whose last token it runs, once launched
    num_tokens: int = 0
    background_left: int = 0     # tokens that background sequences may still have
    is_pool_short: bool = False  # a sequence was preempted: nobody new comes in before the next step

    def take(self, sequence: Sequence, count: int) -> None:
        self.chunks[sequence] = count
        self.num_tokens += count
        if sequence.is_background:
            self.background_left -= count

    def drop(self, sequence: Sequence) -> None:
        count = self.chunks.pop(sequence, 0)
        self.num_tokens -= count
        if sequence.is_background:
            self.background_left += count
