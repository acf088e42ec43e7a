"""A progress bar while weights load: on a terminal a moving one, elsewhere one line at the end."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn


class LoadProgress:
    def __init__(self, what: str) -> None:
        self._what = what
        self._console = Console(stderr=True)
        self._started_at = time.monotonic()
        self._total = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "LoadProgress":
        if self._console.is_terminal:
            self._bar = Progress(TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                                 console=self._console, transient=True)
            self._task = self._bar.add_task(self._what, total=None)
            self._bar.start()
        return self

    def update(self, loaded_bytes: int, total_bytes: int) -> None:
        self._total = total_bytes
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=loaded_bytes, total=total_bytes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._total:
            seconds = time.monotonic() - self._started_at
            rate = self._total / 1e9 / seconds
            print(f"loaded {self._what}: {self._total / 1e9:.2f} GB in {seconds:.1f} s ({rate:.2f} GB/s)", file=sys.stderr)
