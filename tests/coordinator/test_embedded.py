"""nats-server and Valkey as children: they start, keep their data, report their death, and never outlive the farm."""

import asyncio
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from coordinator.bus import Bus
from coordinator.embedded import EmbeddedServices
from coordinator.errors import ConfigError

pytestmark = pytest.mark.services
ROOT = Path(__file__).parents[2]

FARM = """
import sys, signal
from coordinator.embedded import EmbeddedServices
services = EmbeddedServices(sys.argv[1])
services.start()
print(services.nats.port, services.redis.port, services.nats.pid, services.redis.pid, flush=True)
signal.pause()
"""


class Farm:
    """Another process that holds embedded services, and says where they are."""

    def __init__(self, state_dir: Path) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", FARM, str(state_dir)], stdout=subprocess.PIPE, cwd=ROOT)
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.nats_port, self.redis_port, *pids = map(int, output.readline().split())
        self.servers = [psutil.Process(pid) for pid in pids]
        self.guards = [psutil.Process(server.ppid()) for server in self.servers]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def test_servers_come_up_on_free_loopback_ports_under_a_private_directory(tmp_path: Path) -> None:
    state_dir = tmp_path / "deep" / "state"
    async with EmbeddedServices(state_dir) as services:
        async with await Bus.connect(services.nats_url, "test") as bus:
            assert await bus.provision("m")
        with redis.Redis.from_url(services.redis_url) as client:
            config = client.config_get()
            wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "everysec", "save": "", "bind": "127.0.0.1"}
            assert {key: config[key] for key in wanted} == wanted
        listening = {c.laddr.ip for server in (services.nats, services.redis) for c in psutil.Process(server.pid).net_connections()
                     if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        assert services.poll() == {}
        assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    assert is_free(services.nats.port) and is_free(services.redis.port)


def test_ports_that_are_given_are_used_and_a_taken_one_is_named_in_the_error(tmp_path: Path) -> None:
    with EmbeddedServices(tmp_path / "one") as first:
        nats_port, redis_port = first.nats.port, first.redis.port
        with pytest.raises(ConfigError, match=rf"nats-server did not come up(?s:.*){nats_port}(?s:.*)in use"):
            EmbeddedServices(tmp_path / "two", nats_port=nats_port).start()
        with pytest.raises(ConfigError, match=r"valkey-server did not come up(?s:.*)in use"):
            EmbeddedServices(tmp_path / "three", redis_port=redis_port).start()
    with EmbeddedServices(tmp_path / "two", nats_port=nats_port, redis_port=redis_port) as second:
        assert (second.nats_url, second.redis_url) == (f"nats://127.0.0.1:{nats_port}", f"redis://127.0.0.1:{redis_port}")


async def test_a_stopped_farm_that_starts_again_finds_its_data(tmp_path: Path) -> None:
    async with EmbeddedServices(tmp_path) as services, await Bus.connect(services.nats_url, "test") as bus:
        await bus.provision("m")
        await bus.publish_handoff("m", b"handle")
        with redis.Redis.from_url(services.redis_url) as client:
            client.set("k", "v")
    async with EmbeddedServices(tmp_path) as services, await Bus.connect(services.nats_url, "test") as bus:
        assert not await bus.provision("m")
        assert (await bus.counters("m"))["handoff"] == 1
        with redis.Redis.from_url(services.redis_url) as client:
            assert client.get("k") == b"v"


def test_a_server_that_dies_by_itself_is_reported_and_comes_back_on_its_port(tmp_path: Path) -> None:
    deaths: queue.Queue[tuple[str, int]] = queue.Queue()
    with EmbeddedServices(tmp_path, on_exit=lambda name, code: deaths.put((name, code))) as services:
        urls = services.nats_url, services.redis_url
        for server in (services.nats, services.redis):
            os.kill(server.pid, signal.SIGKILL)
            assert deaths.get(timeout=10) == (server.name, 128 + signal.SIGKILL)
            assert services.poll() == {server.name: 128 + signal.SIGKILL}
            server.start()
            assert services.poll() == {}
        assert (services.nats_url, services.redis_url) == urls
        services.restart_nats()
        services.restart_redis()
    assert deaths.empty()   # what was asked for is no death


def test_a_server_that_cannot_come_back_yet_is_tried_by_one_thread_until_it_can(tmp_path: Path) -> None:
    stopping = threading.Event()
    deaths: list[str] = []

    def bring_back(name: str, code: int) -> None:
        deaths.append(name)
        services.server(name).bring_back(stopping)

    with EmbeddedServices(tmp_path, on_exit=bring_back) as services:
        data, log_file, give_up_at = tmp_path / "valkey" / "appendonlydir", tmp_path / "valkey" / "server.log", time.monotonic() + 60
        data.rename(tmp_path / "away")
        data.write_text("no folder: Valkey ends at its start")
        os.kill(services.redis.pid, signal.SIGKILL)
        while log_file.read_text().count("Server initialized") < 4 and time.monotonic() < give_up_at:
            time.sleep(0.05)
        assert deaths == ["valkey-server"]      # a start that failed is no further death
        data.unlink()
        (tmp_path / "away").rename(data)
        while services.poll() and time.monotonic() < give_up_at:
            time.sleep(0.05)
        assert services.poll() == {}
        stopping.set()


def test_no_server_outlives_a_farm_that_was_killed(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    farm.end()
    gone, alive = psutil.wait_procs([*farm.servers, *farm.guards], timeout=20)
    assert not alive and len(gone) == 4
    assert is_free(farm.nats_port) and is_free(farm.redis_port)


def test_no_server_outlives_its_guard(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    try:
        for guard in farm.guards:
            guard.kill()
        _, alive = psutil.wait_procs(farm.servers, timeout=20)
        assert not alive
    finally:
        farm.end()


def test_a_forked_child_of_the_farm_does_not_keep_the_servers_alive(tmp_path: Path) -> None:
    script = FARM.replace("signal.pause()", "import os\nif os.fork() == 0: signal.pause()\nos.kill(os.getpid(), signal.SIGKILL)")
    farm = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert farm.stdout is not None
    with farm.stdout as output:
        pids = list(map(int, output.readline().split()))[2:]
    farm.wait()
    servers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    try:
        _, alive = psutil.wait_procs(servers, timeout=20)
        assert not alive
    finally:
        os.killpg(farm.pid, signal.SIGKILL)


def test_a_second_farm_on_the_same_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    farm = Farm(tmp_path)
    try:
        with pytest.raises(ConfigError, match=rf"in use by another farm \(process {farm.process.pid}\)"):
            EmbeddedServices(tmp_path).start()
        assert all(server.is_running() for server in farm.servers)
    finally:
        farm.end()
    with EmbeddedServices(tmp_path) as services:   # waits for the killed farm's servers, then takes over
        assert services.poll() == {}


def test_a_missing_or_old_server_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho 'nats-server: v2.9.10'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "none"))
    monkeypatch.setattr("importlib.metadata.files", lambda _: [])
    with pytest.raises(ConfigError, match=r"no nats-server 2\.11 or newer found \(.*nats-server is 2\.9\.10\): install it .*--nats_url"):
        EmbeddedServices(tmp_path / "state").start()


async def test_a_large_store_dir_name_needs_no_escaping(tmp_path: Path) -> None:
    state_dir = tmp_path / 'a farm\'s "data" dir é'
    async with EmbeddedServices(state_dir) as services:
        await asyncio.to_thread(services.restart_redis)
        assert services.poll() == {}
    assert (state_dir / "valkey" / "appendonlydir").is_dir()
