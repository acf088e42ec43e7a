"""Times to first token and per token of the jobs that ended here lately, for the planner; dashboards have metrics.py's histograms."""

import time
from collections import deque
from collections.abc import Iterable

WINDOW_S = 60.0
MOST = 1024


class RecentTimes:
    """The last minute, at most 1,024 jobs of it."""

    def __init__(self) -> None:
        self._first: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._per_token: deque[tuple[float, float]] = deque(maxlen=MOST)

    def add(self, first_token_s: float, per_token_s: float | None) -> None:
        now = time.monotonic()
        self._first.append((now, first_token_s))
        if per_token_s is not None:
            self._per_token.append((now, per_token_s))

    def summary(self) -> dict[str, float]:
        """90th percentiles, seconds; 0 when nothing ended."""
        since = time.monotonic() - WINDOW_S
        return {"ttft_p90_s": _p90(value for at, value in self._first if at > since),
                "tpot_p90_s": _p90(value for at, value in self._per_token if at > since)}


def _p90(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.9 * (len(ordered) - 1))] if ordered else 0.0
