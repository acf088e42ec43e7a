"""A tiny parent for one server process: the server ends when whoever started the guard ends, however that happens.

Run as a script by path (standard library only, so it starts in some 20 ms): `server_guard.py GRACE_S KEEP_FD COMMAND…`.
Standard input is a pipe whose other end only the farm holds: `T` asks for a clean stop, `K` kills, end of file (the farm died,
SIGKILL included) means a clean stop, then a kill after the grace. Standard output gets one line, the server's process id or
`error: …`; standard error is the log file of both. The exit code is the server's, 128 + n for signal n. KEEP_FD, a locked
file, stays open in the server: the lock on the store lasts exactly as long as any process may write there.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux the server also dies with a guard that was killed. The guard has one thread, so the flag cannot fire early."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, guard = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:   # the guard died before the flag was set
            os._exit(1)

    return in_child


def guard(server: subprocess.Popen[bytes], grace_s: float, wake_fd: int) -> int:
    """Serve the pipe until the server has ended; its return code, negative for a signal."""
    watched = [0, wake_fd]
    kill_at: float | None = None
    while (code := server.poll()) is None:
        timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic())
        ready, _, _ = select.select(watched, [], [], timeout)
        if kill_at is not None and time.monotonic() >= kill_at:
            server.kill()
            kill_at = None
        asked_to_stop = wake_fd in ready and signal.SIGTERM in os.read(wake_fd, 64)
        if 0 in ready:
            command = os.read(0, 1)
            if command == b"K":
                server.kill()
            else:
                asked_to_stop = True
                if not command:
                    watched.remove(0)
        if asked_to_stop:
            server.terminate()
            kill_at = time.monotonic() + grace_s
    return code


def main() -> int:
    grace_s, keep_fd, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, stderr=2, pass_fds=[keep_fd], preexec_fn=_die_with_parent())
    except OSError as error:
        print(f"error: {error}", flush=True)
        return 127
    os.close(keep_fd)
    print(server.pid, flush=True)
    code = guard(server, grace_s, wake_read)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
