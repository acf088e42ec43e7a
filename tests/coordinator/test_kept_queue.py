"""The queue of a config server: it outlives whoever started it, comes back where it was, and ends when it is told to."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from coordinator import kept_queue, queue_cli
from coordinator.bus import Bus
from coordinator.errors import ConfigError
from coordinator.kept_queue import KeptQueue
from coordinator.messages import Job
from coordinator.queue_record import FILE, QueueRecord, read_record

pytestmark = pytest.mark.services
TOKEN = "a-token-of-the-tests"


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    if (record := read_record(tmp_path / "state" / FILE)) is not None:
        kept_queue.stop(record.pid, tmp_path / "state")


def kept(state_dir: Path, host: str = "127.0.0.1", token: str = "", **flags: str | int) -> KeptQueue:
    return KeptQueue(state_dir, host, token, {"nats_port": 0, "redis_port": 0, **flags})


async def test_a_killed_keeper_is_started_again_on_the_same_ports_with_what_was_queued(state_dir: Path) -> None:
    queue = kept(state_dir)
    await asyncio.to_thread(queue.start)
    urls = queue.record.urls("worker")
    async with await Bus.connect(urls.nats_url, "test") as bus:
        await bus.provision("m")
        await bus.publish_job(Job(job_id="j", origin="o", model="m", prompt_ids=(1,)))
        assert not queue.restart_if_dead()
        servers = psutil.Process(queue.record.pid).children(recursive=True)
        os.kill(queue.record.pid, signal.SIGKILL)
        await asyncio.to_thread(psutil.wait_procs, servers, 20)
        assert await asyncio.to_thread(queue.restart_if_dead)
        assert queue.record.urls("worker") == urls
        assert (await bus.counters("m"))["jobs"]["normal"] == 1     # the same connection goes on
    await asyncio.to_thread(queue.stop)
    assert not kept_queue.runs(queue.record.pid, state_dir)


async def test_a_keeper_that_cannot_be_started_again_yet_is_tried_again(state_dir: Path) -> None:
    queue = kept(state_dir)
    await asyncio.to_thread(queue.start)
    before = queue.record
    servers = psutil.Process(before.pid).children(recursive=True)
    os.kill(before.pid, signal.SIGKILL)
    await asyncio.to_thread(psutil.wait_procs, servers, 20)
    (state_dir / "nats").rename(state_dir / "away")
    (state_dir / "nats").write_text("no folder: the keeper ends at its start")
    assert not await asyncio.to_thread(queue.restart_if_dead)
    (state_dir / "nats").unlink()
    (state_dir / "away").rename(state_dir / "nats")
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(queue.restart_if_dead):
            await asyncio.sleep(0.05)
    assert queue.record.urls("worker") == before.urls("worker")
    await asyncio.to_thread(queue.stop)


def test_a_queue_that_runs_is_adopted_unless_something_else_was_asked_for(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = kept(state_dir, token=TOKEN)
    first.start()
    second = kept(state_dir, token=TOKEN)
    second.start()
    assert second.was_adopted and not first.was_adopted and second.record == first.record
    with pytest.raises(ConfigError, match="was started with a cluster token: stop it first: tokenmill queue stop"):
        kept(state_dir).start()
    with pytest.raises(ConfigError, match=r"listens on 127.0.0.1, not on 0.0.0.0"):
        kept(state_dir, host="0.0.0.0", token=TOKEN).start()
    with pytest.raises(ConfigError, match=f"--nats_port {first.record.nats_port}, not 1: stop it first"):
        kept(state_dir, token=TOKEN, nats_port=1).start()
    with pytest.raises(ConfigError, match="was started without --tls_cert"):
        kept(state_dir, token=TOKEN, tls_cert="cert.pem", tls_key="key.pem").start()
    kept(state_dir, token=TOKEN, redis_port=first.record.redis_port).start()
    assert queue_cli.main(["show", "--state_dir", str(state_dir)]) == 0
    said = capsys.readouterr().out
    assert "running" in said and first.record.passwords["worker"] not in said
    assert queue_cli.main(["stop", "--state_dir", str(state_dir)]) == 0
    first.stop()                       # which finds nothing left to do
    third = kept(state_dir, token=TOKEN)
    third.start()
    assert not third.was_adopted and third.record.urls("worker") == first.record.urls("worker")    # ports and passwords were kept
    third.stop()
    assert queue_cli.main(["show", "--state_dir", str(state_dir)]) == 1


def test_what_keeps_the_queue_from_starting_is_said(state_dir: Path) -> None:
    state_dir.mkdir()
    (state_dir / FILE).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        kept(state_dir).start()
    (state_dir / FILE).unlink()
    with pytest.raises(ConfigError, match="did not start"):
        kept(state_dir, host="192.0.2.1").start()      # no address of this machine


def test_urls_name_the_machine_as_the_asker_saw_it_unless_only_loopback_is_served() -> None:
    passwords = {"worker": "p w", "client": "c"}
    wide = QueueRecord(host="0.0.0.0", nats_port=1, redis_port=2, passwords=passwords)
    assert wide.urls("worker", "config").nats_url == "nats://worker:p%20w@config:1"
    assert wide.urls("worker").redis_url == "redis://worker:p%20w@127.0.0.1:2"
    assert wide.urls("client", "config").redis_url == ""
    narrow = QueueRecord(nats_port=1, redis_port=2)
    assert narrow.urls("worker", "config").nats_url == "nats://127.0.0.1:1"
    joined = QueueRecord(host="first", nats_port=1, redis_port=2, is_here=False)
    assert joined.urls("worker", "second").nats_url == "nats://first:1"
    given = QueueRecord(given={"nats_url": "nats://a,nats://b", "redis_url": "redis://c"})
    assert given.urls("worker", "x").nats_url == "nats://a,nats://b"
