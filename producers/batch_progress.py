"""A batch as it goes, on stderr: done, failed, tokens per second, time left."""

import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WINDOW_S = 10.0


class BatchProgress:
    """A context manager; `show` takes the Batch object as it came."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"),
            TextColumn("{task.fields[rate]} tok/s"), TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task("validating", total=None, failed=0, rate="–")
        self._seen: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        rate = self._rate(batch["usage"]["output_tokens"])
        self._bar.update(self._task, description=batch["status"], total=counts["total"] or None, failed=counts["failed"],
                         completed=counts["completed"] + counts["failed"], rate="–" if rate is None else f"{rate:,.0f}")

    def _rate(self, num_tokens: int) -> float | None:
        """Tokens per second over the last few seconds."""
        now = time.monotonic()
        self._seen.append((now, num_tokens))
        while now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        began_s, before = self._seen[0]
        return (num_tokens - before) / (now - began_s) if now > began_s else None
