"""Start a keeper for a state directory, or adopt the one that runs there; watch it, start it again, stop it."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from coordinator.cluster_token import ENV
from coordinator.errors import ConfigError, TokenmillError
from coordinator.queue_record import FILE, QueueRecord, read_record

log = logging.getLogger(__name__)

START_S = 90.0       # a large store takes a while to load
STOP_S = 20.0
POLL_S = 0.05
RETRY_S = 1.0        # after a keeper that could not be started again


class KeptQueue:
    """NATS and Valkey of one state directory, in the care of a keeper process.

    `start` adopts a keeper that runs there already. `stop` ends keeper and servers; whoever is killed before it gets there leaves them
    running, for its successor. Raises ConfigError when they cannot be started.
    """

    def __init__(self, state_dir: Path, host: str, token: str, flags: Mapping[str, str | int]) -> None:
        """`flags` of the keeper: nats_port, redis_port, nats_monitor_port, tls_cert, tls_key."""
        self._state_dir = state_dir.absolute()
        self._args = ["--state_dir", str(self._state_dir), "--host", host, *(part for name, value in flags.items()
                                                                             for part in (f"--{name}", str(value)))]
        self._host, self._token, self._flags = host, token, flags
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0     # monotonic
        self.was_adopted = False
        self.record = QueueRecord()

    def start(self) -> None:
        record = read_record(self._state_dir / FILE)
        if record is not None and runs(record.pid, self._state_dir):
            self._check_same(record)
            self.record, self.was_adopted = record, True
            return
        self._spawn()

    def restart_if_dead(self) -> bool:
        """True if it had to be started again. A start that fails is tried again at a later call."""
        if self._is_running() or time.monotonic() < self._not_before:
            return False
        log.error("the keeper of the queue (process %d) is gone: started again", self.record.pid)
        try:
            self._spawn()
        except ConfigError as error:
            log.error("%s", error)
            self._not_before = time.monotonic() + RETRY_S
            return False
        return True

    def stop(self) -> None:
        stop(self.record.pid, self._state_dir, self._process)

    def _is_running(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return runs(self.record.pid, self._state_dir)

    def _spawn(self) -> None:
        self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log_path = self._state_dir / "keeper.log"
        environment = {**os.environ, ENV: self._token}
        with log_path.open("ab") as output:
            log_start = output.tell()
            self._process = subprocess.Popen([sys.executable, "-m", "coordinator.queue_keeper", *self._args], stdin=subprocess.DEVNULL,
                                             stdout=output, stderr=output, start_new_session=True, env=environment)
        give_up_at = time.monotonic() + START_S
        while True:
            record = read_record(self._state_dir / FILE)
            if record is not None and record.pid == self._process.pid:
                self.record = record
                return
            status = self._process.poll()
            if status is not None or time.monotonic() > give_up_at:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                self._process.wait()
                said = log_path.read_bytes()[log_start:].decode(errors="replace").strip()
                raise ConfigError(f"NATS and Valkey did not start: {said.rpartition('error: ')[2] or f'status {status}, see {log_path}'}")
            time.sleep(POLL_S)

    def _check_same(self, record: QueueRecord) -> None:
        """An adopted queue keeps its address, its users and its TLS: what was asked for must be what runs."""
        hint = f"stop it first: tokenmill queue stop --state_dir {self._state_dir}"
        if record.host != self._host:
            raise ConfigError(f"the queue that runs in {self._state_dir} listens on {record.host}, not on {self._host}: {hint}")
        if bool(record.passwords) != bool(self._token):
            with_or_not = "with" if record.passwords else "without"
            raise ConfigError(f"the queue that runs in {self._state_dir} was started {with_or_not} a cluster token: {hint}")
        if (record.nats_scheme == "tls") != bool(self._flags.get("tls_cert")):
            with_or_not = "with" if record.nats_scheme == "tls" else "without"
            raise ConfigError(f"the queue that runs in {self._state_dir} was started {with_or_not} --tls_cert: {hint}")
        for name, port in (("nats_port", record.nats_port), ("redis_port", record.redis_port)):
            if self._flags.get(name) not in (None, 0, port):
                raise ConfigError(f"the queue that runs in {self._state_dir} has --{name} {port}, not {self._flags[name]}: {hint}")


def runs(pid: int, state_dir: Path) -> bool:
    """Is this process the keeper of that directory? A number that another process got meanwhile is not."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return _holds_lock(pid, state_dir)   # no /proc on this system
    return state != "Z" and "coordinator.queue_keeper" in command and str(state_dir) in command


def _holds_lock(pid: int, state_dir: Path) -> bool:
    with contextlib.suppress(OSError):
        return (state_dir / "farm.lock").read_text().strip() == str(pid)
    return False


def stop(pid: int, state_dir: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    """End a keeper and its servers, and return once they have ended. Raises TokenmillError if they do not."""
    with contextlib.suppress(ProcessLookupError):
        if runs(pid, state_dir):
            os.kill(pid, signal.SIGTERM)
    give_up_at = time.monotonic() + STOP_S
    while process.poll() is None if process is not None else runs(pid, state_dir):
        if time.monotonic() > give_up_at:
            raise TokenmillError(f"the keeper of the queue in {state_dir} (process {pid}) does not end")
        time.sleep(POLL_S)
