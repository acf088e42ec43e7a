"""Whether a process is stopped (SIGSTOP, a debugger), and for how long. Linux tells; elsewhere nobody is ever stopped."""

import time
from pathlib import Path


def is_stopped(pid: int) -> bool:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
    return after_name.split()[0] in ("T", "t")


class StoppedFor:
    """Asked now and then about one process."""

    def __init__(self) -> None:
        self._since: float | None = None

    def seconds(self, pid: int) -> float:
        if not is_stopped(pid):
            self._since = None
            return 0.0
        now = time.monotonic()
        self._since = self._since or now
        return now - self._since
