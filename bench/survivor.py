"""Cases measured one after the other in a child process that a bad kernel may kill: the next child goes on behind the fatal case.

    parent (no torch)  --starts-->  worker: ledger.begin(key), measure, ledger.finish(key, entry), …
                       <--status--  0 all done or time over; anything else: start another one

An illegal memory access ends every later CUDA call of its process, and a kernel that hangs never returns: both cost one case here.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MOST_RESTARTS = 12
CASE_LIMIT_S = 150.0
HUNG_STATUS, BROKEN_STATUS = 3, 4


class Ledger:
    """What became of each case so far, kept in a file that outlives the process. An entry that was begun and never finished is an error."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path = path
        self._deadline = deadline                  # of time.time(): after it no new case is begun
        self.entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        self._begun_at: float | None = None   # of the case under way
        threading.Thread(target=self._watch, name="hung case watch", daemon=True).start()

    @property
    def is_time_over(self) -> bool:
        return time.time() > self._deadline

    def begin(self, key: str) -> bool:
        """False if it has been tried before or the time is over."""
        if key in self.entries or self.is_time_over:
            return False
        self.finish(key, {"error": "the process died or hung in this case"})
        self._begun_at = time.monotonic()
        return True

    def finish(self, key: str, entry: dict[str, Any]) -> None:
        self.entries[key] = entry
        write_json(self._path, self.entries)
        self._begun_at = None

    def _watch(self) -> None:
        while True:
            time.sleep(1.0)
            begun_at = self._begun_at
            if begun_at is not None and time.monotonic() - begun_at > CASE_LIMIT_S:
                print(f"no progress for {CASE_LIMIT_S:g} s: given up", flush=True)
                os._exit(HUNG_STATUS)


def run_to_the_end(module: str, arguments: list[str], limit_s: float) -> int:
    """Run `python -m module arguments --ledger FILE --deadline TIME` again and again until it ends by itself."""
    deadline = time.time() + limit_s
    with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder:
        command = [sys.executable, "-m", module, *arguments, "--ledger", str(Path(folder) / "ledger.json"), "--deadline", str(deadline)]
        for _ in range(MOST_RESTARTS):
            status = subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
            if status in (0, 2):  # 2: the arguments
                return status
            print(f"--- {module} ended with status {status}; going on behind the case that it was in ---", flush=True)
    return 1


def end_if_broken(error: BaseException) -> None:
    """Called after a failed case: leave the process if CUDA is of no use in it any more."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        print(f"CUDA is broken in this process ({str(broken).splitlines()[0]}) since: {error}", flush=True)
        os._exit(BROKEN_STATUS)


def first_line(error: BaseException) -> str:
    """An exception as one line of a table. The compiler's have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:240]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
