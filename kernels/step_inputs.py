"""What the model reads of a step, made on the device from what only the host knows: lengths and page tables.

The newest token of a decoding sequence may have been drawn in the step before and be known to the device alone: then it is
`carried`, a row of that step's samples, and nobody waits for it.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
TOKENS = 256


def decode_inputs(tokens: Tensor, carried: Tensor, seq_lens: Tensor, page_table: Tensor, samples: Tensor, page_size: int,
                  token_ids: Tensor, positions: Tensor, slots: Tensor) -> None:
    """One new token in each of N sequences.

    tokens      [N] int32, used where `carried` is -1
    carried     [N] int32, row of `samples` [rows] int64 that is the token, or -1
    seq_lens    [N] int32, the new token included; 0 for a padding row, which gets token 0, position 0 and slot -1
    page_table  [N, max_pages] int32
    returns     in token_ids, positions, slots [N] int64
    """
    num_seqs = tokens.shape[0]
    _decode_kernel[(triton.cdiv(num_seqs, BLOCK),)](tokens, carried, seq_lens, page_table, samples, token_ids, positions, slots, num_seqs,
                                                    page_table.stride(0), PAGE_SIZE=page_size, BLOCK=BLOCK, num_warps=2)


def prefill_inputs(cu_q: Tensor, seq_lens: Tensor, page_table: Tensor, max_q: int, page_size: int, positions: Tensor,
                   slots: Tensor) -> None:
    """Positions and slots of the last new tokens of B sequences.

    cu_q        [B + 1] int32: sequence b's new tokens are rows cu_q[b] to cu_q[b + 1]
    seq_lens    [B] int32, new tokens included
    page_table  [B, max_pages] int32
    max_q       the most new tokens of one sequence
    returns     in positions, slots [T] int64
    """
    _prefill_kernel[(triton.cdiv(max_q, TOKENS), seq_lens.shape[0])](cu_q, seq_lens, page_table, positions, slots, page_table.stride(0),
                                                                     PAGE_SIZE=page_size, BLOCK=TOKENS, num_warps=4)


@triton.jit(do_not_specialize=["num_seqs"])
def _decode_kernel(tokens, carried, seq_lens, page_table, samples, token_ids, positions, slots, num_seqs, table_stride,
                   PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    seq = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_here = seq < num_seqs
    length = tl.load(seq_lens + seq, mask=is_here, other=0)
    is_real = length > 0
    row = tl.load(carried + seq, mask=is_real, other=-1)
    token = tl.load(tokens + seq, mask=is_real, other=0).to(tl.int64)
    token = tl.where(row >= 0, tl.load(samples + row, mask=row >= 0, other=0), token)
    position = tl.maximum(length - 1, 0)
    page = tl.load(page_table + seq.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=is_real, other=0).to(tl.int64)
    tl.store(token_ids + seq, token, mask=is_here)
    tl.store(positions + seq, position.to(tl.int64), mask=is_here)
    tl.store(slots + seq, tl.where(is_real, page * PAGE_SIZE + position % PAGE_SIZE, -1), mask=is_here)


@triton.jit
def _prefill_kernel(cu_q, seq_lens, page_table, positions, slots, table_stride, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    seq = tl.program_id(1)
    start, end = tl.load(cu_q + seq), tl.load(cu_q + seq + 1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_here = token < end - start
    position = tl.load(seq_lens + seq) - (end - start) + token
    page = tl.load(page_table + seq.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=is_here, other=0).to(tl.int64)
    tl.store(positions + start + token, position.to(tl.int64), mask=is_here)
    tl.store(slots + start + token, page * PAGE_SIZE + position % PAGE_SIZE, mask=is_here)
