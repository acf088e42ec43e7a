"""Statistics on known latencies."""

import pytest

from bench.closed_loop import Outcome, Run, judge
from bench.http_stream import Response
from bench.streams import APIS, Stream
from bench.summary import Summary, percentile
from bench.workload import WorkItem


def valid(first_token_s: float, gap_s: float, num_tokens: int, prompt_len: int = 10) -> Outcome:
    times = tuple(first_token_s + gap_s * index for index in range(num_tokens))
    return Outcome(WorkItem((7,) * prompt_len, num_tokens), 200, "", times[-1], times[0], Stream(times))


def test_percentiles_interpolate_between_ranks() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([5], 99) == 5
    assert percentile(list(range(101)), 95) == 95
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_known_latencies_give_known_figures() -> None:
    outcomes = tuple(valid(first_token_s=0.1 * n, gap_s=0.01 * n, num_tokens=11) for n in (1, 2, 3))
    summary = Summary.of(Run((*outcomes, Outcome(WorkItem((1, 2), 4), 429, "full")), elapsed_s=2.0))
    assert (summary.num_requests, summary.num_valid, summary.qps) == (4, 3, 1.5)
    assert (summary.input_tokens, summary.output_tokens) == (30, 33)  # refused work is no throughput
    assert summary.first_token_time_s[50] == pytest.approx(0.2)
    assert summary.decode_token_time_s[100] == pytest.approx(0.03)
    assert summary.request_time_s[100] == pytest.approx(0.6)
    assert summary.statuses == {"200 valid": 3, "429": 1}
    assert "decode_token_time P50: 20.000000ms" in summary.lines()


def test_a_run_without_a_valid_answer_still_has_a_summary() -> None:
    summary = Summary.of(Run((Outcome(WorkItem((1,), 4), 503, "down"),), elapsed_s=1.0))
    assert "valid num = 0; all data num = 1; valid ratio = 0.0" in summary.lines()
    assert summary.first_token_time_s == {} and summary.details == {"down": 1}


def test_a_token_counts_from_the_arrival_of_its_whole_event() -> None:
    def event(number: int, is_last: bool) -> bytes:
        finish = b'true,"finish_reason":"length"' if is_last else b'false,"finish_reason":null'
        return b'data:{"token":{"id":9,"text":"x","count_output_tokens":%d,"prompt_tokens":1},"finished":%s}\n\n' % (number, finish)

    first, second = event(1, False), event(2, True)
    pieces = [(1.0, first[:20]), (2.0, first[20:] + second[:5]), (3.5, second[5:])]
    outcome = judge(Response(sent_at=0.5, status=200, pieces=pieces), APIS["lightllm"], WorkItem((4,), 2))
    assert outcome.stream is not None
    assert outcome.stream.times == (2.0, 3.5) and outcome.stream.token_ids == (9, 9)
    assert (outcome.first_token_s, outcome.request_s, outcome.decode_token_s) == (1.5, 3.0, 1.5)
