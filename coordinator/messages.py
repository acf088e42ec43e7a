"""Every message that crosses a process border over the queue: frozen dataclasses and their msgpack form.

Each body is one msgpack map with a schema version `v`. Evolution rule: a change that an old reader could misread gets a new
version; unknown versions and unknown keys are refused (MalformedMessage), never guessed at. Token ids and log probabilities
travel packed, little-endian (u32 and f32). Nothing here is trusted: sizes, types and ranges are checked before use.
"""

import re
import sys
import time
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
from pydantic import TypeAdapter, ValidationError

from coordinator.errors import InvalidField, MalformedMessage
from coordinator.sampling import SamplingParams

VERSION = 1
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
MAX_ID_CHARS = 128
_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ID_CHARS}}}")
CLASSES = ("interactive", "normal", "batch")

JobClass = Literal["interactive", "normal", "batch"]
FinishReason = Literal["stop", "length", "cancelled", "expired", "error"]


def new_job_id() -> str:
    """A UUIDv7: sortable by time, unique without a counter server (RFC 9562)."""
    millis = time.time_ns() // 1_000_000
    tail = uuid.uuid4().int & ((1 << 80) - 1)
    value = (millis << 80) | tail
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return str(uuid.UUID(int=value))


def pack_ids(token_ids: Iterable[int]) -> bytes:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    if len(packed) % 4:
        raise MalformedMessage(f"packed token ids of {len(packed)} bytes are not whole u32")
    ids = array("I", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


def pack_floats(values: Iterable[float]) -> bytes:
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_floats(packed: bytes) -> list[float]:
    if len(packed) % 4:
        raise MalformedMessage(f"packed floats of {len(packed)} bytes are not whole f32")
    values = array("f", packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


TopLogprobs = tuple[tuple[int, float], ...]  # of one output token: (token id, log probability) of the likeliest tokens, likeliest first
PackedTops = tuple[tuple[bytes, bytes], ...]  # of consecutive output tokens: (packed ids, packed log probabilities)


def pack_tops(tops: Iterable[TopLogprobs]) -> PackedTops:
    return tuple((pack_ids(token_id for token_id, _ in top), pack_floats(logprob for _, logprob in top)) for top in tops)


def unpack_tops(packed: Iterable[Iterable[bytes]]) -> tuple[TopLogprobs, ...]:
    """Raises MalformedMessage, or ValueError and TypeError for what has another shape."""
    return tuple(tuple(zip(unpack_ids(ids), unpack_floats(logprobs), strict=True)) for ids, logprobs in packed)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise MalformedMessage(f"msgpack extension type {code} is not allowed")


def _unique_pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise MalformedMessage("a map names the same key twice")
    return mapping


def decode_map(data: bytes) -> dict[str, Any]:
    """Bytes to a map of version VERSION, without the `v`. Raises MalformedMessage with the reason."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        body = msgpack.unpackb(data, ext_hook=_refuse_extension, object_pairs_hook=_unique_pairs)
    except (ValueError, TypeError, msgpack.StackError, msgpack.FormatError, msgpack.ExtraData) as error:
        raise MalformedMessage(f"not a msgpack message: {type(error).__name__} {error}"[:300]) from None
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise MalformedMessage("the body is not a map with string keys")
    version = body.pop("v", None)
    if version != VERSION or isinstance(version, bool):
        raise MalformedMessage(f"schema version {version!r:.40} is not known here (this side speaks {VERSION})")
    return body


def encode_map(body: dict[str, Any]) -> bytes:
    return msgpack.packb({"v": VERSION, **body})  # type: ignore[no-any-return]


def _validate(adapter: TypeAdapter[Any], body: dict[str, Any]) -> Any:
    try:
        return adapter.validate_python(body, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise MalformedMessage(f"{where}: {first['msg']}") from None


def check_id(name: str, value: str) -> str:
    """Ids become NATS subject tokens and Redis keys: letters, digits, `-` and `_` only. Raises InvalidField."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise InvalidField(name, f"must be 1 to {MAX_ID_CHARS} letters, digits, '-' or '_', got {value!r:.80}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request. Exactly one of `prompt_ids` (token ids) and `text` is given; a worker tokenizes text as the producer would.

    `origin` names the producer whose frames carry the answer. `deadline_ms` is Unix time; past it the job ends as `expired`.
    """

    job_id: str
    origin: str
    model: str
    klass: JobClass = "normal"
    prompt_ids: tuple[int, ...] | None = None
    text: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    created_ms: int = 0
    deadline_ms: int | None = None
    tenant: str = ""
    traceparent: str = ""

    def encode(self) -> bytes:
        body: dict[str, Any] = {"job_id": self.job_id, "origin": self.origin, "model": self.model, "klass": self.klass,
                                "params": self.params.to_wire(), "created_ms": self.created_ms}
        if self.prompt_ids is not None:
            body["prompt_ids"] = pack_ids(self.prompt_ids)
        if self.text is not None:
            body["text"] = self.text
        for name in ("deadline_ms", "tenant", "traceparent"):
            if (value := getattr(self, name)):
                body[name] = value
        return encode_map(body)

    @classmethod
    def decode(cls, data: bytes) -> "Job":
        """Raises MalformedMessage, or InvalidField when it is a job but asks for something that cannot be honoured."""
        return cls.from_map(decode_map(data))

    @classmethod
    def from_map(cls, body: dict[str, Any]) -> "Job":
        known = {"job_id", "origin", "model", "klass", "prompt_ids", "text", "params", "created_ms", "deadline_ms", "tenant", "traceparent"}
        if (unknown := sorted(set(body) - known)):
            raise InvalidField(str(unknown[0])[:80], "unknown field of a job")
        packed, text = body.get("prompt_ids"), body.get("text")
        if (packed is None) == (text is None):
            raise InvalidField("prompt_ids", "exactly one of prompt_ids and text must be given")
        if packed is not None and not isinstance(packed, bytes):
            raise InvalidField("prompt_ids", "must be packed little-endian u32 bytes")
        if text is not None and (not isinstance(text, str) or not text):
            raise InvalidField("text", "must be a string that is not empty")
        prompt_ids = tuple(unpack_ids(packed)) if packed is not None else None
        if prompt_ids is not None and not prompt_ids:
            raise InvalidField("prompt_ids", "must not be empty")
        klass = body.get("klass", "normal")
        if klass not in CLASSES:
            raise InvalidField("klass", f"must be one of {', '.join(CLASSES)}, got {klass!r:.40}")
        return cls(
            job_id=check_id("job_id", body.get("job_id", "")), origin=check_id("origin", body.get("origin", "")),
            model=check_id("model", body.get("model", "")), klass=klass, prompt_ids=prompt_ids, text=text,
            params=SamplingParams.parse(body.get("params", {})),
            created_ms=_millis("created_ms", body.get("created_ms", 0)),
            deadline_ms=None if body.get("deadline_ms") is None else _millis("deadline_ms", body["deadline_ms"]),
            tenant=_short_text("tenant", body.get("tenant", "")), traceparent=_short_text("traceparent", body.get("traceparent", "")),
        )


def _millis(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise InvalidField(name, "must be Unix time in milliseconds")
    return value


def _short_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_ID_CHARS:
        raise InvalidField(name, f"must be a string of at most {MAX_ID_CHARS} characters")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """How a job ended. `prompt_tokens` and `cached_tokens` are counts; `error` is set for reason `error` only."""

    reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Consecutive output tokens of one job, first at `first_index` (0 = first generated token).

    `texts` aligns with `token_ids`: what each token added to the visible text (may be empty while a character or a possible
    stop string is incomplete). With `finish` set this is the job's last run: storing it on a chain commits the job.
    """

    job_id: str
    epoch: int
    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    texts: tuple[str, ...]
    finish: Finish | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()

    def to_wire(self) -> list[Any]:
        wire = [self.job_id, self.epoch, self.first_index, pack_ids(self.token_ids), pack_floats(self.logprobs), list(self.texts)]
        if self.finish is not None:
            f = self.finish
            wire.append([f.reason, f.prompt_tokens, f.cached_tokens, f.error])
        if self.top_logprobs:
            wire += [pack_tops(self.top_logprobs)] if self.finish is not None else [None, pack_tops(self.top_logprobs)]
        return wire

    @classmethod
    def from_wire(cls, wire: Any) -> "TokenRun":
        try:
            job_id, epoch, first, ids, logprobs, texts, *last = wire
            finish, tops = None, last[1] if len(last) == 2 else ()
            if len(last) > 2:
                raise MalformedMessage(f"a token run of {len(wire)} fields")
            if last and last[0] is not None:
                reason, prompt_tokens, cached_tokens, error = last[0]
                if reason not in ("stop", "length", "cancelled", "expired", "error"):
                    raise MalformedMessage(f"finish reason {reason!r:.40}")
                finish = Finish(reason=reason, prompt_tokens=int(prompt_tokens), cached_tokens=int(cached_tokens), error=str(error))
            run = cls(job_id=job_id, epoch=epoch, first_index=first, token_ids=tuple(unpack_ids(ids)),
                      logprobs=tuple(unpack_floats(logprobs)), texts=tuple(texts), finish=finish, top_logprobs=unpack_tops(tops))
        except (TypeError, ValueError) as error:
            raise MalformedMessage(f"token run: {error}"[:200]) from None
        if not (isinstance(job_id, str) and isinstance(epoch, int) and isinstance(first, int) and all(isinstance(t, str) for t in run.texts)
                and len(run.token_ids) == len(run.logprobs) == len(run.texts) and len(run.top_logprobs) in (0, len(run.token_ids))):
            raise MalformedMessage("token run: fields of wrong types or unequal lengths")
        return run


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What one worker appends to one chain: token runs of many jobs, or a tombstone by the worker that took over."""

    runs: tuple[TokenRun, ...] = ()
    tombstone: str = ""  # who fenced this chain ("worker.incarnation"); "" on an ordinary frame

    def encode(self) -> bytes:
        if self.tombstone:
            return encode_map({"tombstone": self.tombstone})
        return encode_map({"runs": [run.to_wire() for run in self.runs]})

    @classmethod
    def decode(cls, data: bytes) -> "Frame":
        body = decode_map(data)
        if set(body) == {"tombstone"} and isinstance(body["tombstone"], str) and body["tombstone"]:
            return cls(tombstone=body["tombstone"])
        if set(body) != {"runs"} or not isinstance(body["runs"], list):
            raise MalformedMessage("a frame has either runs or a tombstone")
        return cls(runs=tuple(TokenRun.from_wire(run) for run in body["runs"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """What must be equal on both sides before one byte of KV cache moves, but for `tp_size`: heads are split anew on the way.

    `row` is elements per token and layer of the whole model, K and V together.
    """

    model: str
    weights: str        # hash over config and weight files' names, sizes and heads
    kind: str           # "mla" or "gqa"
    num_layers: int
    row: int
    dtype: str
    page_size: int
    tp_size: int = 1        # ranks that each hold a pool with the same page numbers
    num_kv_heads: int = 1   # what `row` is split by over the ranks; a latent cache has one, which every rank holds whole


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRank:
    """How one rank's pool is reached: memory that processes of its host map, and the desk where any host asks for pages. "": not."""

    address: str = ""
    desk: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSource:
    """The worker that holds the pages, and how its ranks are reached. `host` is coordinator.host_identity's: addresses mean nothing
    on another."""

    worker: str
    incarnation: int
    host: str
    ranks: tuple[KVRank, ...]
    num_pages: int
    dp_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVHandle:
    """Where a prefill worker holds one sequence's KV cache until a decode worker has it. Also carries the job and its first tokens.

    `page_ids` are pages of the source in token order, `num_tokens` of them filled (the last page may be partly filled).
    `generation` names this pin: the source answers "still pinned" only for the same one.
    """

    job: bytes                    # the encoded Job
    epoch: int
    source: KVSource
    layout: KVLayout
    num_tokens: int
    page_ids: tuple[int, ...]
    generation: int
    prompt_ids: bytes             # packed: what the pages were computed from, tokenized text included
    output: bytes                 # packed ids of the tokens shown so far
    logprobs: bytes
    texts: tuple[str, ...]
    cached_tokens: int
    ack_subject: str
    chains: tuple[str, ...]       # owners ("worker.incarnation") whose chains may hold frames of this job
    emitters: tuple[str, ...]     # owners that emitted the tokens so far, in token order
    lease_expires_ms: int
    top_logprobs: PackedTops = ()  # of the tokens shown so far, if the job asked for them; else absent on the wire

    def encode(self) -> bytes:
        return encode_map(_without_empty_tops(_HANDLE.dump_python(self, mode="python")))

    @classmethod
    def decode(cls, data: bytes) -> "KVHandle":
        handle: KVHandle = _validate(_HANDLE, decode_map(data))
        if handle.num_tokens < 1 or len(handle.page_ids) * handle.layout.page_size < handle.num_tokens:
            raise MalformedMessage("KV handle: fewer pages than tokens")
        if any(not 0 <= p < handle.source.num_pages for p in handle.page_ids):
            raise MalformedMessage("KV handle: a page outside of the source's pool")
        if len(handle.source.ranks) != handle.layout.tp_size:
            raise MalformedMessage("KV handle: another number of ranks than its layout has")
        return handle


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalRecord:
    """The one record of a finished job: its frames folded. Whoever folds writes the same bytes."""

    job_id: str
    origin: str
    model: str
    reason: FinishReason
    error: str
    epoch: int
    prompt_tokens: int
    cached_tokens: int
    token_ids: bytes          # packed u32
    logprobs: bytes           # packed f32
    texts: tuple[str, ...]    # one per token; joined they are the text
    workers: tuple[str, ...]  # "worker.incarnation" of each chain that emitted, in token order
    top_logprobs: PackedTops = ()  # one per token if the job asked for them; else absent on the wire

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def encode(self) -> bytes:
        return encode_map(_without_empty_tops(_FINAL.dump_python(self, mode="python")))

    @classmethod
    def decode(cls, data: bytes) -> "FinalRecord":
        return _validate(_FINAL, decode_map(data))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A job that cannot be served, kept whole for inspection and replay."""

    subject: str
    reason: str
    payload: bytes
    at_ms: int
    job_id: str = ""
    history: tuple[str, ...] = ()

    def encode(self) -> bytes:
        return encode_map(_DEAD.dump_python(self, mode="python"))

    @classmethod
    def decode(cls, data: bytes) -> "DeadLetter":
        return _validate(_DEAD, decode_map(data))  # type: ignore[no-any-return]


def _without_empty_tops(body: dict[str, Any]) -> dict[str, Any]:
    """Readers from before they existed know the rest."""
    if not body["top_logprobs"]:
        del body["top_logprobs"]
    return body


def _adapter(cls: Any) -> TypeAdapter[Any]:
    _forbid_extra(cls)
    return TypeAdapter(cls)


def _forbid_extra(cls: Any) -> None:
    cls.__pydantic_config__ = {"extra": "forbid"}


_forbid_extra(KVLayout)
_forbid_extra(KVRank)
_forbid_extra(KVSource)
_HANDLE = _adapter(KVHandle)
_FINAL = _adapter(FinalRecord)
_DEAD = _adapter(DeadLetter)
