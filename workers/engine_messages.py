"""What the I/O process and the engine process say to each other: frozen dataclasses and their msgpack maps.

Both ends come from one checkout and die together, so there is no schema version: a message is `{"kind": name, **fields}` and
anything unknown or of a wrong type is refused (MalformedMessage). Token ids travel packed, little-endian u32 (`pack_ids`).
Both directions keep their order: an event about a job that the I/O process sends `Cancel` for may still be on its way.
"""

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

import msgpack
from pydantic import Field, PlainValidator, TypeAdapter, ValidationError

from coordinator.errors import InvalidField, MalformedMessage
from coordinator.messages import KVLayout, KVRank, TopLogprobs
from coordinator.sampling import SamplingParams

EngineFinish = Literal["stop", "length"]
Count = Annotated[int, Field(ge=0)]
Params = Annotated[SamplingParams, PlainValidator(SamplingParams.parse)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAddress:
    """How other processes reach a worker's KV pools, one per rank; their page size stands in the layout."""

    ranks: tuple[KVRank, ...]
    num_pages: Count      # of each of them


@dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """Where one rank of a group runs."""

    rank: Count
    host: str
    pid: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """What operators see of the ranks that compute together (`tokenmill status`). Numbers are within the deployment."""

    generation: Count
    tp: Count
    dp: Count
    moe_mode: str
    dp_rank: Count
    ranks: tuple[RankView, ...]   # of this dp group


# ---- commands: I/O process -> engine ----


@dataclass(frozen=True, slots=True, kw_only=True)
class AddSequence:
    """Prefill `token_ids` (prompt, then the output shown so far), then go on at output index len(token_ids) - num_prompt.

    A job id that the engine already has starts anew: its earlier life is cancelled first.
    """

    job_id: str
    token_ids: bytes      # packed u32
    num_prompt: Count
    params: Params        # with the seed filled in when do_sample
    is_background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportSequence:
    """Allocate pages, copy what the own prefix cache lacks from `source`, answer `Imported`, then wait for `Activate`."""

    job_id: str
    token_ids: bytes      # packed u32: prompt + output so far; the last one is not in the source's cache
    num_prompt: Count
    params: Params
    num_kv_tokens: Count  # tokens whose keys and values the pages hold, normally len(token_ids) - 1
    source: PoolAddress
    page_ids: tuple[Count, ...]  # pages of the source in token order
    layout: KVLayout
    is_background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """The source confirmed that its pages stayed pinned until `Imported`: decoding may start."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Forget this job at whatever stage and free all it holds. An unknown id is fine. There is no answer but the next Stats."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasePin:
    """The pages of a pinned sequence were copied (or given up): they go to the prefix cache. An unknown id is fine."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRole:
    """Forget every sequence and go on under this role. What was computed stays in the prefix cache."""

    role: Literal["prefill", "decode", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TellBlocks:
    """The next Blocks shall tell all that the prefix cache has. Without `report_blocks` there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Answered by Pong between two steps: an engine that answers is not stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Leave the loop and exit with status 0. (An engine whose channel closes exits at once.)"""


# ---- events: engine -> I/O process ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Weights read so far; sent while loading."""

    loaded_bytes: Count
    total_bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Sent once, after loading and warm-up. No command is handled earlier (they wait in the channel)."""

    layout: KVLayout
    pool: PoolAddress
    device: str               # cpu or cuda:N
    max_total_tokens: Count   # what the KV pool holds
    max_seq_len: Count        # most tokens of one sequence, prompt and output
    max_num_seqs: Count       # sequences running at once
    chunk_size: Count         # prompt tokens of one prefill step
    vocab_size: Count
    eos_ids: tuple[Count, ...]
    group: GroupView | None = None


class TokenRow(NamedTuple):
    """One new token. `output_index` counts from 0; `finish` is set on a sequence's last row (an EOS row included).

    `top_logprobs` is None unless the job asked for them.
    """

    job_id: str
    output_index: int
    token_id: int
    logprob: float
    finish: EngineFinish | None
    top_logprobs: TopLogprobs | None = None


class Prefilled(NamedTuple):
    """A prompt was computed in this step, `cached_tokens` of it taken from the prefix cache. Once per AddSequence."""

    job_id: str
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """All that one step produced, at most one row per sequence."""

    rows: tuple[TokenRow, ...]
    prefilled: tuple[Prefilled, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Role prefill, right after the first token's Tokens: these pages stay as they are until ReleasePin or Cancel."""

    job_id: str
    generation: Count
    num_tokens: Count             # tokens with keys and values in the pages; the last page may be partly filled
    page_ids: tuple[Count, ...]  # in token order


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The copy for ImportSequence ended. Not ok: the sequence is gone and `error` says why."""

    job_id: str
    ok: bool
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """This job can never run here; nothing of it is left in the engine. `field` names the offending parameter, or is ""."""

    job_id: str
    error: str
    field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Pages that the prefix cache gained and lost since the last one, by their packed digests; `is_all`: all that it has."""

    added: bytes
    evicted: bytes
    is_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to Ping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Pages (free + cached + held == total; cached ones may be evicted, held ones not) and sequences by state.

    `free_tokens` is what may still be admitted: free and cached pages less what admitted and waiting sequences may yet take.
    """

    free_pages: Count
    total_pages: Count
    cached_pages: Count
    held_pages: Count
    pinned: Count        # sequences, as the three below; importing ones wait for their copy or for Activate
    running: Count
    waiting: Count
    importing: Count
    free_tokens: Count
    pending_tokens: Count = 0   # of prompts, not computed yet


Command = AddSequence | ImportSequence | Activate | Cancel | ReleasePin | SetRole | TellBlocks | Ping | Shutdown
Event = Progress | Ready | Tokens | Pinned | Imported | Failed | Blocks | Pong | Stats

COMMANDS: dict[str, type[Command]] = {
    "add": AddSequence, "import": ImportSequence, "activate": Activate, "cancel": Cancel, "release_pin": ReleasePin,
    "set_role": SetRole, "tell_blocks": TellBlocks, "ping": Ping, "shutdown": Shutdown,
}
EVENTS: dict[str, type[Event]] = {
    "progress": Progress, "ready": Ready, "tokens": Tokens, "pinned": Pinned, "imported": Imported, "failed": Failed,
    "blocks": Blocks, "pong": Pong, "stats": Stats,
}


def encode(message: Command | Event) -> bytes:
    return msgpack.packb({"kind": _KIND_OF[type(message)], **_to_map(message)})  # type: ignore[no-any-return]


def decode_command(data: bytes) -> Command:
    """Raises MalformedMessage, or InvalidField when only the sampling parameters are wrong."""
    return _decode(data, _COMMAND_ADAPTERS)  # type: ignore[no-any-return]


def decode_event(data: bytes) -> Event:
    """Raises MalformedMessage."""
    return _decode(data, _EVENT_ADAPTERS)  # type: ignore[no-any-return]


def _to_map(message: Any) -> dict[str, Any]:
    body = {}
    for name in _FIELDS[type(message)]:
        value = getattr(message, name)
        if isinstance(value, SamplingParams):
            value = value.to_wire()
        elif is_dataclass(value):
            value = _to_map(value)
        elif name == "ranks":
            value = [_to_map(rank) for rank in value]
        body[name] = value
    return body


def _decode(data: bytes, adapters: dict[str, TypeAdapter[Any]]) -> Any:
    try:
        body = msgpack.unpackb(data, use_list=False)
    except (ValueError, TypeError, msgpack.StackError, msgpack.FormatError, msgpack.ExtraData) as error:
        raise MalformedMessage(f"not a msgpack message: {type(error).__name__} {error}"[:300]) from None
    if not isinstance(body, dict):
        raise MalformedMessage("the body is not a map")
    kind = body.pop("kind", None)
    adapter = adapters.get(kind) if isinstance(kind, str) else None
    if adapter is None:
        raise MalformedMessage(f"kind {kind!r:.40} is not one of {', '.join(adapters)}")
    try:
        return adapter.validate_python(body)
    except InvalidField:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise MalformedMessage(f"{kind}: {where}: {first['msg']}"[:300]) from None


def _adapter(cls: type) -> TypeAdapter[Any]:
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return TypeAdapter(cls)


_adapter(PoolAddress)
_adapter(RankView)
_adapter(GroupView)
_COMMAND_ADAPTERS = {kind: _adapter(cls) for kind, cls in COMMANDS.items()}
_EVENT_ADAPTERS = {kind: _adapter(cls) for kind, cls in EVENTS.items()}
_KIND_OF: dict[type, str] = {cls: kind for kind, cls in (*COMMANDS.items(), *EVENTS.items())}
_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(f.name for f in fields(cls)) for cls in (*_KIND_OF, PoolAddress, KVRank, KVLayout, GroupView, RankView)}
