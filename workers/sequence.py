"""One request inside the engine: its whole life as plain counters; everything else is derived.

    token_ids   [ prompt 0..num_prompt | output, known ............. ]( num_in_flight: being drawn )
    KV cache    [ computed 0..num_computed            | pending, next to run                      ]
    page_table  [ path: shared with the prefix tree | ours, filled | ours, blank                  ]

The output index of a token is its position less num_prompt, also when a sequence starts with output that was shown before.

A device may still be drawing a sequence's newest token when its next step is prepared. Such a token counts in all numbers (it has its
place, and its keys and values may be computed) but is not in `token_ids`: whoever reads those sees known tokens only. `num_computed`
grows when a step is launched, so it says what later steps will find, not what has been computed by now.
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coordinator.errors import InvalidField
from coordinator.messages import KVLayout, KVRank, TopLogprobs, unpack_ids
from coordinator.sampling import SamplingParams
from workers.engine_messages import AddSequence, EngineFinish, ImportSequence
from workers.radix_cache import Node

if TYPE_CHECKING:
    from workers.guided import Guide


class State(enum.Enum):
    """WAITING -> RUNNING -> (PINNED, role prefill) -> FINISHED; an import: WAITING -> IMPORTING -> IMPORTED -> RUNNING."""

    WAITING = enum.auto()    # holds no page
    IMPORTING = enum.auto()  # its pages are being written by a copy
    IMPORTED = enum.auto()   # copied; unproven until activated, so the prefix tree does not know these pages
    RUNNING = enum.auto()
    PINNED = enum.auto()     # prefilled; another process may read the pages
    FINISHED = enum.auto()   # holds nothing; also cancelled and failed


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSource:
    """Where an imported sequence's KV lies: `num_tokens` of them in `page_ids` of the pool of each of these ranks."""

    ranks: tuple[KVRank, ...]
    num_pages: int
    page_ids: tuple[int, ...]
    num_tokens: int
    layout: KVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What any sequence must keep within. `prefill_only`: it ends (or moves on) after its first new token."""

    vocab_size: int
    max_seq_len: int
    prefill_only: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Compared and hashed by identity: a job id may come back after a cancel."""

    job_id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    max_kv_tokens: int                   # most tokens whose KV it will ever hold here; the last token's is never needed
    is_background: bool = False          # of a batch: it takes what the others leave
    source: ImportSource | None = None   # set until an import was activated
    state: State = State.WAITING
    num_computed: int = 0
    num_in_flight: int = 0               # tokens that launched steps draw: at most 1 when a step is scheduled
    sample_row: int = -1                 # where the newest of them will stand among its step's samples
    num_cached_tokens: int = 0           # of the prompt, found in the prefix tree when it was first admitted
    page_table: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)  # nodes of the first len(path) pages, locked
    generation: int = 0                  # of its pin
    is_prefill_reported: bool = False
    sampling: Any = None                 # the sampler's memory of this sequence; opaque here
    guide: "Guide | None" = None         # what it may say next: never scheduled while its newest token is not known
    # What launched steps found likeliest, oldest first, if its params ask for it: called once the step's result is there.
    tops: deque[Callable[[], TopLogprobs]] = field(default_factory=deque)
    stop_runs: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.stop_runs = [list(run) for run in self.params.stop_token_runs]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output(self) -> int:
        """Also the output index of the token that the next step draws."""
        return len(self.token_ids) + self.num_in_flight - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that must run before the next one can be drawn: 1 in decode, more in prefill."""
        return len(self.token_ids) + self.num_in_flight - self.num_computed

    @property
    def num_remaining(self) -> int:
        return self.params.max_new_tokens - self.num_output

    def num_max_pages(self, page_size: int) -> int:
        return num_pages_for(self.max_kv_tokens, page_size)

    def finish_reason(self, eos_ids: frozenset[int]) -> EngineFinish | None:
        """Why the last known output token ended it, or None."""
        token_ids = self.token_ids
        num_known = len(token_ids) - self.num_prompt
        if self.guide is not None and self.guide.is_finished:
            return "stop"
        if token_ids[-1] in eos_ids and not self.params.ignore_eos:
            return "stop"
        for run in self.stop_runs:
            if len(run) <= num_known and token_ids[-len(run):] == run:
                return "stop"
        return "length" if num_known >= self.params.max_new_tokens else None


def num_pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def open_sequence(command: AddSequence | ImportSequence, limits: Limits) -> Sequence:
    """A sequence as a command asks for it. Raises InvalidField naming what cannot be honoured."""
    token_ids, params = unpack_ids(command.token_ids), command.params
    _check(command.num_prompt, token_ids, params, limits)
    sequence = Sequence(
        job_id=command.job_id, token_ids=token_ids, num_prompt=command.num_prompt, params=params, is_background=command.is_background,
        max_kv_tokens=len(token_ids) if limits.prefill_only else command.num_prompt + params.max_new_tokens - 1)
    if isinstance(command, ImportSequence):
        # Whatever the pages hold of the last token is left: it must run here anyway, to draw the next one.
        num_tokens = min(command.num_kv_tokens, len(token_ids) - 1)
        num_pages = num_pages_for(num_tokens, command.layout.page_size)
        if not num_tokens:
            raise InvalidField("num_kv_tokens", "an import must hold at least one token and lack the last one")
        if len(command.page_ids) < num_pages or any(page >= command.source.num_pages for page in command.page_ids):
            raise InvalidField("page_ids", f"{num_tokens} tokens need {num_pages} pages below {command.source.num_pages}")
        sequence.source = ImportSource(ranks=command.source.ranks, num_pages=command.source.num_pages, num_tokens=num_tokens,
                                       page_ids=command.page_ids[:num_pages], layout=command.layout)
    return sequence


def _check(num_prompt: int, token_ids: list[int], params: SamplingParams, limits: Limits) -> None:
    if not 0 < num_prompt <= len(token_ids):
        raise InvalidField("num_prompt", f"must be between 1 and the {len(token_ids)} tokens given, got {num_prompt}")
    biased = [token_id for token_id, _ in params.logit_bias]
    for name, ids in (("prompt_ids", token_ids), ("allowed_token_ids", params.allowed_token_ids), ("logit_bias", biased)):
        if ids and max(ids) >= limits.vocab_size:
            raise InvalidField(name, f"token id {max(ids)} is not below the vocabulary size {limits.vocab_size}")
    if num_prompt >= limits.max_seq_len:
        raise InvalidField("prompt_ids", f"{num_prompt} tokens leave no room for output in the longest sequence of {limits.max_seq_len}")
    if num_prompt + params.max_new_tokens > limits.max_seq_len:
        raise InvalidField("max_new_tokens", f"{num_prompt} prompt tokens + {params.max_new_tokens} new ones are over "
                                             f"the longest sequence of {limits.max_seq_len} tokens")
    if len(token_ids) - num_prompt >= params.max_new_tokens:
        raise InvalidField("max_new_tokens", f"all {params.max_new_tokens} output tokens are there already")


def slots_for(pages: list[int], start: int, end: int, size: int) -> list[int]:
    """Where the tokens [start, end) of a sequence with these pages lie in the pool."""
    slots: list[int] = []
    for index in range(start // size, (end - 1) // size + 1):
        first = pages[index] * size
        slots += range(first + max(0, start - index * size), first + min(size, end - index * size))
    return slots
