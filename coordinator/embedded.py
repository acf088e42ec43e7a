"""nats-server and Valkey as child processes of the farm, with everything they keep under one state directory.

    state_dir/              0700 when made here
      farm.lock             held while any process of this farm's servers lives
      nats/                 nats.conf, server.log, jetstream/
      valkey/               valkey.conf, server.log, appendonlydir/

Servers listen on loopback unless another address is given. They end with the process that started them, SIGKILL included (server_guard.py).
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator import queue_users, server_binaries
from coordinator.errors import ConfigError
from coordinator.server_process import GuardedProcess
from coordinator.subjects import MAX_PAYLOAD_BYTES

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
GRACE_S = 5.0             # a server that was asked to stop is killed after this
START_TIMEOUT_S = 60.0    # a large store takes a while to load
FREE_PORT_TRIES = 5
RESTART_S = 1.0           # between two tries to bring a server back

ExitCallback = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may reach the servers: the address they bind, and the passwords of their users by role (none: no users).

    tls_cert, tls_key   NATS then speaks TLS only. (The wheels' Valkey cannot: TLS for Redis needs a server of your own.)
    """

    host: str = HOST
    passwords: dict[str, str] = field(default_factory=dict)
    tls_cert: str = ""
    tls_key: str = ""

    @property
    def probe_host(self) -> str:
        return HOST if self.host in ("0.0.0.0", "::") else self.host


class _Server:
    """What both servers share: start on a port that stays the same, become ready, end."""

    name: str
    scheme: str

    def __init__(self, folder: Path, port: int, on_exit: ExitCallback | None, access: "Access") -> None:
        self.folder, self.port, self._on_exit, self._access = folder, port, on_exit, access
        self._lock_fd = -1
        self._process: GuardedProcess | None = None

    @property
    def url(self) -> str:
        """Where this machine's own processes reach it, without a user."""
        return f"{self.scheme}://{self._access.probe_host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server itself. Raises ConfigError if it was never started."""
        if self._process is None:
            raise ConfigError(f"{self.name} was not started")
        return self._process.pid

    def poll(self) -> int | None:
        """None while the server runs, else its exit code (128 + n for signal n; 0 before the first start)."""
        return 0 if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start, or start again on the same port and data; returns when it answers. Raises ConfigError with its last log lines."""
        if self.poll() is None:
            return
        self.stop()   # lets go of a run that ended by itself
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._launch()
        callback = self._on_exit
        if self._process is not None and callback is not None:
            self._process.watch(lambda code: callback(self.name, code))

    def bring_back(self, stopping: threading.Event) -> None:
        """Start again after it ended by itself; tried until it runs, or until `stopping`. For `on_exit`, whose thread may block."""
        while not stopping.is_set():
            try:
                self.start()
                return
            except ConfigError as error:
                log.error("%s", error)
                stopping.wait(RESTART_S)

    def stop(self) -> None:
        """A clean stop; everything stored stays for the next start."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """SIGKILL, for fault tests; start() brings the server back."""
        if self._process is not None:
            self._process.kill()

    def hold_lock(self, lock_fd: int) -> None:
        self._lock_fd = lock_fd

    def _launch(self) -> None:
        raise NotImplementedError

    def _run(self, command: list[str]) -> GuardedProcess:
        self._process = GuardedProcess(command, self.folder / "server.log", self._lock_fd, GRACE_S)
        return self._process

    def _wait_until(self, is_ready: Callable[[], bool]) -> None:
        assert self._process is not None
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self._process.kill()
                raise ConfigError(f"{self.name} did not come up; its last log lines:\n{self._process.log_tail()}")
            time.sleep(0.005)

    def _ask(self, request: bytes, until: bytes) -> bytes:
        """One answer from the server's port; empty while nobody listens. Costs one short connection."""
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection((self._access.probe_host, self.port), timeout=1.0) as connection:
            connection.sendall(request)
            while until not in answer and (received := connection.recv(65536)):
                answer += received
        return answer


class NatsServer(_Server):
    """nats-server with JetStream. Port 0: the server picks one, and keeps it over restarts."""

    name, scheme = "nats-server", "nats"

    def __init__(self, folder: Path, port: int, monitor_port: int | None, on_exit: ExitCallback | None, access: Access) -> None:
        super().__init__(folder, port, on_exit, access)
        self._monitor_port = monitor_port

    def _launch(self) -> None:
        server_name = f"tokenmill-{secrets.token_hex(4)}"
        for stale in self.folder.glob("*.ports"):
            stale.unlink()
        config = self.folder / "nats.conf"
        _write_private(config, self._config(server_name))
        process = self._run([str(server_binaries.nats_server().path), "-c", str(config)])
        if self.port == 0:
            self._wait_until(lambda: self._read_port(process.pid))
        # Another server may sit on a port that was given to us: only our own name means ready.
        self._wait_until(lambda: f'"server_name":"{server_name}"'.encode() in self._ask(b"", until=b"\r\n"))

    def _config(self, server_name: str) -> str:
        settings: dict[str, Any] = {
            "listen": f"{self._access.host}:{self.port or -1}", "server_name": server_name, "max_payload": MAX_PAYLOAD_BYTES,
            "ports_file_dir": str(self.folder), "jetstream": {"store_dir": str(self.folder)}}
        if self._access.passwords:
            settings["authorization"] = queue_users.nats_authorization(self._access.passwords)
        if self._access.tls_cert:
            settings["tls"] = {"cert_file": self._access.tls_cert, "key_file": self._access.tls_key}
        if self._monitor_port is not None:
            settings["http"] = f"{self._access.host}:{self._monitor_port or -1}"
        return json.dumps(settings, indent=2, ensure_ascii=False)   # NATS reads JSON, but no \u escapes

    def _read_port(self, pid: int) -> bool:
        try:
            ports = json.loads((self.folder / f"nats-server_{pid}.ports").read_text())
        except (OSError, ValueError):   # not there yet, or half written
            return False
        self.port = int(ports["nats"][0].rpartition(":")[2])
        return True


class ValkeyServer(_Server):
    """Valkey (or Redis 7) with an append-only file. Port 0: a free port is picked, and kept over restarts."""

    name, scheme = "valkey-server", "redis"

    def _launch(self) -> None:
        picks_port = self.port == 0
        for tries_left in reversed(range(FREE_PORT_TRIES)):
            if picks_port:
                self.port = _free_port()
            config = self.folder / "valkey.conf"
            _write_private(config, self._config())
            process = self._run([str(server_binaries.redis_server().path), str(config)])
            try:
                self._wait_until(lambda pid=process.pid: self._is_ready(pid))  # type: ignore[misc]
                return
            except ConfigError:
                # Between the pick and the bind another process may have taken the port.
                if not (picks_port and tries_left and "in use" in process.log_tail()):
                    raise

    def _is_ready(self, pid: int) -> bool:
        """It is our process that answers, and it has loaded its data."""
        password = self._access.passwords.get("operator", "")
        login = f"AUTH operator {password}\r\n".encode() if password else b""
        state = self._ask(login + b"INFO server persistence\r\nPING\r\n", until=b"+PONG")
        return f"process_id:{pid}\r".encode() in state and b"\nloading:0\r" in state

    def _config(self) -> str:
        return "\n".join([
            f"bind {self._access.host}", f"port {self.port}", f"dir {json.dumps(str(self.folder), ensure_ascii=False)}", "daemonize no",
            'save ""', "appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction",
            # Without passwords and off loopback (--insecure was said), Valkey would refuse everybody but this machine.
            *(queue_users.valkey_lines(self._access.passwords) if self._access.passwords else ["protected-mode no"]), ""])


class EmbeddedServices:
    """Both servers, as `async with`, as `with`, or by start() and stop() from a supervisor.

    state_dir        where both keep their data; a second farm on the same directory is refused
    nats_port, redis_port   0 picks free ports
    nats_monitor_port   None: no monitoring port; 0: any
    on_exit          called with (server's name, exit code) from another thread when a server ends by itself;
                     `services.nats.start()` or `services.redis.start()` bring it back on the same port with its data
    access           who may reach them (default: this machine, without passwords)

    start() raises ConfigError: no server binary, port taken, state directory in use or not writable.
    """

    def __init__(self, state_dir: Path | str, nats_port: int = 0, redis_port: int = 0, *, nats_monitor_port: int | None = None,
                 on_exit: ExitCallback | None = None, access: Access | None = None) -> None:
        self.state_dir = Path(state_dir).absolute()
        access = access or Access()
        self.nats = NatsServer(self.state_dir / "nats", nats_port, nats_monitor_port, on_exit, access)
        self.redis = ValkeyServer(self.state_dir / "valkey", redis_port, on_exit, access)
        self._lock_fd: int | None = None

    @property
    def nats_url(self) -> str:
        return self.nats.url

    @property
    def redis_url(self) -> str:
        return self.redis.url

    def start(self) -> None:
        self._lock_fd = _lock(self.state_dir)
        try:
            for server in (self.nats, self.redis):
                server.hold_lock(self._lock_fd)
                server.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        try:
            self.redis.stop()
            self.nats.stop()
        finally:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
                self._lock_fd = None

    def server(self, name: str) -> _Server:
        """By the name that `on_exit` is told."""
        return self.nats if name == self.nats.name else self.redis

    def restart_nats(self) -> None:
        """Kill and start again: the same port, the same store."""
        self.nats.kill()
        self.nats.start()

    def restart_redis(self) -> None:
        self.redis.kill()
        self.redis.start()

    def poll(self) -> dict[str, int]:
        """Exit codes of the servers that do not run, by name; empty while all is well."""
        return {server.name: code for server in (self.nats, self.redis) if (code := server.poll()) is not None}

    def __enter__(self) -> "EmbeddedServices":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> "EmbeddedServices":
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.stop)


def _lock(state_dir: Path) -> int:
    """A descriptor that holds the farm's lock. Raises ConfigError if another living farm holds it."""
    try:
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        state_dir.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(state_dir / "farm.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(f"state directory {state_dir} cannot be used: {error.strerror}") from None
    give_up_at = time.monotonic() + GRACE_S + 1.0
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
            # The servers of a farm that was just killed hold the lock until they have stopped.
            if _is_alive(holder) or time.monotonic() > give_up_at:
                os.close(fd)
                raise ConfigError(f"state directory {state_dir} is in use by another farm (process {holder}): "
                                  "stop that one, or give this one a --state_dir of its own") from None
            time.sleep(0.02)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write_private(path: Path, text: str) -> None:
    """It may have passwords in it."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
