"""A child process that ends with its parent, however that ends: the child holds the read end of a pipe that only the parent writes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

ENV = "TOKENMILL_LIFELINE_FD"
DRAINED_STATUS = 3     # a worker that left because an operator said so: not to be started again


def spawn(module: str, args: Sequence[str], *, output: IO[bytes] | None = None,
          environment: Mapping[str, str] = os.environ) -> tuple[subprocess.Popen[bytes], int]:
    """Start `python -m module args` on a lifeline. Returns the process and the fd that keeps it alive: close it to end the child.

    `output` takes what it prints (default: where ours goes).
    """
    ours_read, ours_write = os.pipe()
    os.set_inheritable(ours_write, False)
    try:
        process = subprocess.Popen([sys.executable, "-m", module, *args], stdin=subprocess.DEVNULL, pass_fds=[ours_read], stdout=output,
                                   stderr=output, env={**environment, ENV: str(ours_read)}, start_new_session=True)
    finally:
        os.close(ours_read)
    return process, ours_write


def hold_on() -> None:
    """Call once at a child's start: SIGTERM to itself when the parent is gone, SIGKILL if that does not end it."""
    fd = os.environ.pop(ENV, None)
    if fd is None:
        return
    threading.Thread(target=_watch, args=(int(fd),), name="lifeline", daemon=True).start()


def _watch(fd: int) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(5.0)
    os.kill(os.getpid(), signal.SIGKILL)
