"""Order, duplicates, gaps and bounds of one job's answer."""

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.messages import Finish, TokenRun
from producers import job_stream
from producers.job_stream import JobStream


def run(first: int, *token_ids: int, finish: str | None = None, epoch: int = 1) -> TokenRun:
    return TokenRun(job_id="j", epoch=epoch, first_index=first, token_ids=token_ids, logprobs=(0.0,) * len(token_ids),
                    texts=tuple(f" {t}" for t in token_ids), finish=Finish(reason=finish) if finish else None)  # type: ignore[arg-type]


def tokens(stream: JobStream) -> list[int]:
    return [t for r in stream.take() for t in r.token_ids]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), length=st.integers(0, 12))
def test_every_token_leaves_once_in_order_whatever_the_order_of_runs(data: st.DataObject, length: int) -> None:
    answer = list(range(100, 100 + length))
    cuts = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted)
    pieces = data.draw(st.lists(cuts, max_size=15))
    runs = [run(a, *answer[a:b]) for a, b in [*pieces, (0, length)]] + [run(length, finish="stop"), run(length, finish="stop", epoch=2)]
    stream, seen = JobStream(), []
    for r in data.draw(st.permutations(runs)):
        stream.push(r)
        if data.draw(st.booleans()):
            seen += tokens(stream)
    assert seen + tokens(stream) == answer
    assert stream.finish == Finish(reason="stop") and not stream.is_behind


def test_a_second_epoch_that_overlaps_the_first_shows_only_what_is_new() -> None:
    stream = JobStream()
    stream.push(run(0, 1, 2, 3))
    stream.push(run(1, 2, 3, 4, 5, epoch=2, finish="length"))
    assert tokens(stream) == [1, 2, 3, 4, 5] and stream.finish == Finish(reason="length")


def test_a_gap_is_known_and_closes_when_the_missing_run_comes() -> None:
    stream = JobStream()
    stream.push(run(0, 1))
    stream.push(run(2, 3, finish="stop"))
    assert tokens(stream) == [1] and stream.is_behind and stream.finish is None
    stream.push(run(1, 2))
    assert tokens(stream) == [2, 3] and not stream.is_behind and stream.finish == Finish(reason="stop")


def test_a_lost_last_token_keeps_the_end_back() -> None:
    stream = JobStream()
    stream.push(run(1, finish="stop"))
    assert stream.is_behind and stream.finish is None and not stream.has_news


def test_a_reader_that_does_not_read_fills_only_a_bounded_buffer_and_loses_nothing() -> None:
    limit = job_stream.MAX_UNREAD_TOKENS
    answer = list(range(limit + 10))
    stream = JobStream()
    for start in range(0, len(answer), 100):
        stream.push(run(start, *answer[start:start + 100]))
    stream.push(run(len(answer), finish="length"))
    assert stream.num_unread == limit and stream.is_behind and not stream.has_room
    seen = tokens(stream)
    stream.push(run(0, *answer, finish="length"))  # read again
    assert seen + tokens(stream) == answer and stream.finish == Finish(reason="length")
