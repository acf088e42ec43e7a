"""Processes of a bench: started on a lifeline with their words in a file, their CPU time and memory read from the system."""

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from coordinator import lifeline

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.05


class BenchProcess:
    """One `python -m module args`."""

    def __init__(self, name: str, module: str, args: Sequence[str], folder: Path) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with self.log_path.open("wb") as log:
            self.process, self._lifeline = lifeline.spawn(module, args, output=log, environment=environment)
        self._measured = psutil.Process(self.process.pid)

    def wait_for(self, words: str, timeout_s: float = 60.0) -> None:
        """Until it has said this. Raises RuntimeError with its last words when it ends or takes too long."""
        give_up_at = time.monotonic() + timeout_s
        while words not in self.log:
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{self.name} did not say {words!r}:\n{self.log[-2000:]}")
            time.sleep(POLL_S)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def rss_mb(self) -> float:
        return float(self._measured.memory_info().rss) / 1e6

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends with its lifeline; waits for it."""
        if self._lifeline >= 0:
            if self.process.poll() is None:
                self.process.terminate()
            try:
                self.process.wait(20.0)
            except subprocess.TimeoutExpired:
                self.kill()
            os.close(self._lifeline)
            self._lifeline = -1


class CpuTimes:
    """CPU seconds of groups of processes since this was made, of those that died meanwhile up to their last sample."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._groups = {name: [psutil.Process(pid) for pid in group] for name, group in pids.items()}
        self._first = self._read()
        self._last = dict(self._first)

    def sample(self) -> None:
        self._last |= self._read()

    def spent(self) -> dict[str, float]:
        return {name: sum(self._last[process.pid] - self._first[process.pid] for process in group) for name, group in self._groups.items()}

    def _read(self) -> dict[int, float]:
        found = {}
        for group in self._groups.values():
            for process in group:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    found[process.pid] = float(times.user + times.system)
        return found
