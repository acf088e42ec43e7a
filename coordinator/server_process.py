"""Start one server under its guard and tell when it ended. Knows processes, pipes and log files; not what the server is."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from coordinator.errors import ConfigError

GUARD = Path(__file__).with_name("server_guard.py")
MAX_LOG_BYTES = 16 * 1024 * 1024

# A forked child must not keep the pipes open, or the guards would outwait it; exec'd children never inherit them.
_pipe_fds: set[int] = set()


def _close_pipes_in_child() -> None:
    if not _pipe_fds:
        return
    # Replaced, not closed: the objects that own these numbers would later close whatever had got them since.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in _pipe_fds:
        os.dup2(null, fd, inheritable=False)
    os.close(null)
    _pipe_fds.clear()


os.register_at_fork(after_in_child=_close_pipes_in_child)


class GuardedProcess:
    """One run of one server, from start to end.

    command    what to run; its output is appended to `log_path`
    keep_fd    a file descriptor that the server keeps open for life (the lock on its store)
    grace_s    after a polite stop request the server has this long before it is killed

    Raises ConfigError if the command cannot be run.
    """

    def __init__(self, command: list[str], log_path: Path, keep_fd: int, grace_s: float) -> None:
        if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
            log_path.unlink()
        self.log_path, self._grace_s, self._asked = log_path, grace_s, False
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C reaches the farm, which then stops its servers last.
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(grace_s), str(keep_fd), *command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pass_fds=[keep_fd], start_new_session=True, bufsize=0)
        assert self._guard.stdin is not None
        _pipe_fds.add(self._guard.stdin.fileno())
        self.pid = self._read_pid(command[0])

    def watch(self, on_exit: Callable[[int], None]) -> None:
        """Have `on_exit` called, from a thread of its own, with the exit code when the server ends without being asked to.

        For a server that is up: one that ends earlier is the concern of whoever starts it.
        """
        threading.Thread(target=self._report_exit, args=[on_exit], name=f"watch {self.pid}", daemon=True).start()

    def poll(self) -> int | None:
        """The exit code (128 + n for signal n), or None while the server runs."""
        code = self._guard.poll()
        return code if code is None else _shell_code(code)

    def stop(self) -> None:
        """Ask for a clean stop, wait for it; killed after the grace."""
        self._ask(b"T")

    def kill(self) -> None:
        """SIGKILL, as a crash would end it."""
        self._ask(b"K")

    def log_tail(self, num_lines: int = 12) -> str:
        """The last lines that this run wrote to its log."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _ask(self, command: bytes) -> None:
        self._asked = True
        assert self._guard.stdin is not None
        if not self._guard.stdin.closed:
            with contextlib.suppress(BrokenPipeError):   # the server had ended, and its guard with it
                self._guard.stdin.write(command)
            self._guard.wait(self._grace_s + 10.0)
            self._close()

    def _read_pid(self, program: str) -> int:
        assert self._guard.stdout is not None
        with self._guard.stdout as answer:
            line = answer.readline().decode().strip()
        if line.isdigit():
            return int(line)
        self._guard.wait()
        self._close()
        raise ConfigError(f"cannot run {program}: {line.removeprefix('error: ') or self.log_tail()}")

    def _close(self) -> None:
        assert self._guard.stdin is not None
        if not self._guard.stdin.closed:
            _pipe_fds.discard(self._guard.stdin.fileno())
            self._guard.stdin.close()

    def _report_exit(self, on_exit: Callable[[int], None]) -> None:
        code = self._guard.wait()
        if not self._asked:
            on_exit(_shell_code(code))


def _shell_code(code: int) -> int:
    """The guard itself may have been killed; the server died with it."""
    return code if code >= 0 else 128 - code
