"""Redis by Sentinel: after a failover the store goes on with the new primary; what cannot be honoured is refused."""

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import server_binaries
from coordinator.errors import ConfigError, Unavailable
from coordinator.store import Store

pytestmark = pytest.mark.services
WAIT_S = 40.0


@contextlib.contextmanager
def server(folder: Path, port: int, *lines: str) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir()
    config = folder / "conf"
    config.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', *lines, ""]))
    sentinel = ["--sentinel"] if any("sentinel" in line for line in lines) else []
    if sentinel:
        config.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {folder}", *lines, ""]))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server_binaries.redis_server().path, str(config), *sentinel], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def until_it_answers(store: Store) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while True:
        try:
            await store.register("probe", {"model": "m"})
            return
        except Unavailable:
            assert time.monotonic() < give_up_at


async def test_the_store_follows_a_failover(tmp_path: Path) -> None:
    first, second, watch = free_port(), free_port(), free_port()
    watched = [f"sentinel monitor farm 127.0.0.1 {first} 1", "sentinel down-after-milliseconds farm 500",
               "sentinel failover-timeout farm 3000"]
    with server(tmp_path / "1", first) as primary, server(tmp_path / "2", second, f"replicaof 127.0.0.1 {first}"), \
            server(tmp_path / "s", watch, *watched):
        store = Store(f"redis+sentinel://127.0.0.1:{watch}/farm", lease_s=1.0)
        await until_it_answers(store)
        await store.found()
        before = await store.hash("meta")
        give_up_at = time.monotonic() + WAIT_S
        while "online" not in (tmp_path / "1/log").read_text() and "succeeded" not in (tmp_path / "1/log").read_text():
            assert time.monotonic() < give_up_at, (tmp_path / "1/log").read_text()
            await asyncio.sleep(0.05)
        while "+slave" not in (tmp_path / "s/log").read_text():      # it must know the replica before it can promote it
            assert time.monotonic() < give_up_at, (tmp_path / "s/log").read_text()
            await asyncio.sleep(0.05)
        primary.kill()
        with pytest.raises(Unavailable):
            await store.ping()
        await until_it_answers(store)
        after = await store.hash("meta")
        assert after["era"] != before["era"]       # another server: living owners say again what they own
        await store.close()


@pytest.mark.parametrize(("url", "said"), [
    ("redis+cluster://a:1,b:2", "cluster is not taken"), ("http://x", "must begin with redis://"),
    ("redis+sentinel://u:secret@a:1/", "host:port/service"), ("redis+sentinel://a,b/farm", "named with its port"),
])
def test_what_cannot_be_honoured_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        Store(url)
    assert "secret" not in str(refused.value)
