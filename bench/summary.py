"""Figures of a closed loop: throughput, latency percentiles, and what happened to every request."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.closed_loop import Run

PERCENTILES = (25, 50, 75, 90, 95, 99, 100)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. Raises ValueError on no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Throughputs count valid requests only, over the wall time of the whole run. Times are in seconds."""

    num_requests: int
    num_valid: int
    elapsed_s: float
    input_tokens: int
    output_tokens: int
    request_time_s: dict[int, float]  # percentile -> value; empty if nothing was valid
    first_token_time_s: dict[int, float]
    decode_token_time_s: dict[int, float]
    statuses: dict[str, int]
    details: dict[str, int]  # what went wrong, most frequent first

    @property
    def qps(self) -> float:
        return self.num_valid / self.elapsed_s

    @property
    def output_throughput(self) -> float:
        return self.output_tokens / self.elapsed_s

    @classmethod
    def of(cls, run: Run) -> "Summary":
        valid = [outcome for outcome in run.outcomes if outcome.is_valid]
        return cls(
            num_requests=len(run.outcomes),
            num_valid=len(valid),
            elapsed_s=run.elapsed_s,
            input_tokens=sum(len(outcome.item.prompt_ids) for outcome in valid),
            output_tokens=sum(len(outcome.stream.times) for outcome in valid if outcome.stream),
            request_time_s=_percentiles([outcome.request_s for outcome in valid]),
            first_token_time_s=_percentiles([outcome.first_token_s for outcome in valid]),
            decode_token_time_s=_percentiles([outcome.decode_token_s for outcome in valid if outcome.decode_token_s is not None]),
            statuses=dict(Counter(status_name(outcome.status, outcome.is_valid) for outcome in run.outcomes).most_common()),
            details=dict(Counter(outcome.detail for outcome in run.outcomes if outcome.detail).most_common(10)),
        )

    def lines(self) -> list[str]:
        """The seed client's printed lines."""
        per_request = max(self.num_valid, 1)
        lines = [
            f"valid num = {self.num_valid}; all data num = {self.num_requests}; valid ratio = {self.num_valid / max(self.num_requests, 1)}",
            "",
            f"Total QPS: {self.qps}",
            f"Avg Input Length: {self.input_tokens / per_request}",
            f"Avg Output Length: {self.output_tokens / per_request}",
            f"Total Throughput: {(self.input_tokens + self.output_tokens) / self.elapsed_s} token/s",
            f"Input Throughput: {self.input_tokens / self.elapsed_s} token/s",
            f"Output Throughput: {self.output_throughput} token/s",
        ]
        for name, values, scale, unit in (
            ("request_time", self.request_time_s, 1, "s"),
            ("first_token_time", self.first_token_time_s, 1, "s"),
            ("decode_token_time", self.decode_token_time_s, 1000, "ms"),
        ):
            lines.append("-" * 10)
            lines += [f"{name} P{percent}: {value * scale:.6f}{unit}" for percent, value in values.items()]
        return lines

    def status_table(self) -> Table:
        table = Table("status", "requests", "share", title="answers by status")
        for status, count in self.statuses.items():
            table.add_row(status, str(count), f"{count / self.num_requests:.2%}")
        return table

    def to_json(self) -> dict[str, Any]:
        return {
            "num_requests": self.num_requests, "num_valid": self.num_valid, "elapsed_s": self.elapsed_s, "qps": self.qps,
            "input_tokens": self.input_tokens, "output_tokens": self.output_tokens,
            "input_throughput": self.input_tokens / self.elapsed_s, "output_throughput": self.output_throughput,
            "request_time_s": _named(self.request_time_s), "first_token_time_s": _named(self.first_token_time_s),
            "decode_token_time_s": _named(self.decode_token_time_s), "statuses": self.statuses, "details": self.details,
        }  # fmt: skip


def status_name(status: int, is_valid: bool) -> str:
    if status == 0:
        return "no answer"
    if status == 200:
        return "200 valid" if is_valid else "200 invalid stream"
    return str(status)


def _percentiles(values: Sequence[float]) -> dict[int, float]:
    return {percent: percentile(values, percent) for percent in PERCENTILES} if values else {}


def _named(values: dict[int, float]) -> dict[str, float]:
    return {f"p{percent}": value for percent, value in values.items()}
