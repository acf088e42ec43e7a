"""What a leader tells its followers, and they answer: msgpack arrays whose first item names the kind.

A step travels as token ids, lengths and page tables; positions and slots follow from those. Messages keep their order, so a page copy
comes before the first step that may read it, and behind the steps that may still write to its pages.
"""

from dataclasses import dataclass
from typing import Any

import msgpack

from coordinator.errors import MalformedMessage
from coordinator.messages import KVLayout, pack_ids, unpack_ids
from workers.batch import Agreed, ForwardBatch
from workers.sequence import num_pages_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A follower that has loaded: which rank it is, and how its KV pool is reached (KVRank)."""

    token: str
    generation: int
    rank: int
    num_pages: int = 0
    address: str = ""
    desk: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Copy pages of another worker's pools; answered by Copied. `ranks`: address and desk of each of its ranks."""

    copy_id: int
    ranks: list[tuple[str, str]]
    num_pages: int
    layout: dict[str, Any]
    src_pages: list[int]
    dst_pages: list[int]
    num_tokens: int

    @property
    def kv_layout(self) -> KVLayout:
        return KVLayout(**self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    copy_id: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Leave in order: the leader does too."""


_KINDS: dict[str, type] = {"hello": Hello, "copy": Copy, "copied": Copied, "stop": Stop}
_NAMES = {cls: kind for kind, cls in _KINDS.items()}
Message = Hello | Copy | Copied | Stop


def encode(message: Message) -> bytes:
    return msgpack.packb([_NAMES[type(message)], {name: getattr(message, name) for name in message.__slots__}])  # type: ignore[no-any-return]


def encode_step(batch: ForwardBatch, page_size: int) -> bytes:
    pages: list[int] = []
    for table, seq_len in zip(batch.page_tables, batch.seq_lens, strict=True):
        pages += table[:num_pages_for(seq_len, page_size)]
    agreed = batch.agreed and [batch.agreed.num_rows, batch.agreed.is_decode]
    return msgpack.packb(["step", pack_ids(batch.token_ids), pack_ids(batch.query_lens), pack_ids(batch.seq_lens),  # type: ignore[no-any-return]
                          pack_ids(pages), pack_ids(batch.logit_rows), batch.carried, agreed])


def decode(data: bytes, page_size: int = 1) -> Message | ForwardBatch:
    """`page_size` is needed for steps. Raises MalformedMessage."""
    try:
        kind, *body = msgpack.unpackb(data, use_list=False)
        if kind == "step":
            return _step(body, page_size)
        (fields,) = body
        return _KINDS[kind](**fields)  # type: ignore[no-any-return]
    except (ValueError, TypeError, KeyError, IndexError, msgpack.StackError, msgpack.FormatError, msgpack.ExtraData) as error:
        raise MalformedMessage(f"not a message between ranks: {type(error).__name__} {error}"[:300]) from None


def _step(body: list[Any], page_size: int) -> ForwardBatch:
    token_ids, query_lens, seq_lens, pages, logit_rows = map(unpack_ids, body[:5])
    batch = ForwardBatch(token_ids, [], [], query_lens, seq_lens, [], logit_rows, list(body[5]))
    if body[6] is not None:
        batch.agreed = Agreed(*body[6])
    first = 0
    for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
        table = pages[first:first + num_pages_for(seq_len, page_size)]
        first += len(table)
        batch.page_tables.append(table)
        positions = range(seq_len - query_len, seq_len)
        batch.positions += positions
        batch.slot_mapping += [table[position // page_size] * page_size + position % page_size for position in positions]
    return batch
