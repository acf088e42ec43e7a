"""A batch as two of half the tokens, for passes that take turns. A chunk of a prompt may be cut: its second half runs behind the first."""

from workers.batch import ForwardBatch


def halves(batch: ForwardBatch, middle: int) -> tuple[ForwardBatch, ForwardBatch]:
    """The first `middle` tokens, and the others. In each layer the first half must store its keys and values before the second attends.

    Every rank halves whatever it has, nothing included: all make the same calls. What is agreed is known of the whole only.
    """
    first, second = (ForwardBatch([], [], [], [], [], [], [], []) for _ in range(2))
    for half, rows in ((first, slice(0, middle)), (second, slice(middle, None))):
        half.token_ids, half.positions = batch.token_ids[rows], batch.positions[rows]
        half.slot_mapping = batch.slot_mapping[rows]  # empty where the device finds the slots itself
    first.logit_rows = [row for row in batch.logit_rows if row < middle]
    second.logit_rows = [row - middle for row in batch.logit_rows if row >= middle]
    carried = batch.carried or [-1] * len(batch.query_lens)
    at = 0
    for query_len, seq_len, pages, row in zip(batch.query_lens, batch.seq_lens, batch.page_tables, carried, strict=True):
        in_first = min(max(middle - at, 0), query_len)
        in_second = query_len - in_first
        at += query_len
        for half, count, end in ((first, in_first, seq_len - in_second), (second, in_second, seq_len)):
            if count:
                half.query_lens.append(count)
                half.seq_lens.append(end)
                half.page_tables.append(pages)
                half.carried.append(row)
    return first, second
