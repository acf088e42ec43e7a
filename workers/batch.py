"""What one forward pass computes, as plain lists: built by the scheduler, turned into tensors by the model runner."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Agreed:
    """The same on all ranks of an EP deployment for a step that they run together. One whose dp group has no work runs it empty."""

    num_rows: int              # the most new tokens that any dp group has
    is_decode: bool            # every group has nothing but tokens whose successors are drawn: one of each sequence


@dataclass(slots=True)
class ForwardBatch:
    """New tokens of several sequences, flattened; prefill chunks and decodes (one new token) in any order.

    The first three have one entry per new token, the next three one per sequence. Keys and values of all new tokens are stored before
    any attention is computed. A page table may hold more pages than the sequence fills; it is the scheduler's own list, which only ever
    grows at its end (where pages are exchanged the sequence gets a new list): read it before the next step is scheduled.

    A sequence may go on before its newest token is known: `carried` then says which of the samples of the step launched just before
    this one is its token, and token_ids has a 0 in its place. Only a sequence with one new token is carried.
    """

    token_ids: list[int]
    positions: list[int]            # place of the token in its sequence, from 0
    slot_mapping: list[int]         # where its keys and values go: page id * page_size + offset
    query_lens: list[int]           # new tokens of the sequence, at least 1
    seq_lens: list[int]             # its tokens so far, the new ones included
    page_tables: list[list[int]]    # its page ids in token order
    logit_rows: list[int]           # rows of token_ids whose logits are wanted, ascending
    carried: list[int] = field(default_factory=list)  # per sequence: row of the previous launch's samples, or -1; empty: none
    agreed: "Agreed | None" = None                    # with MOE_MODE=EP: what the dp groups know of each other's batches
