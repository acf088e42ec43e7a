"""Users of the farm's own NATS and Valkey: each role can do its work, and not that of others."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from coordinator import queue_users
from coordinator.bus import Bus
from coordinator.embedded import Access, EmbeddedServices
from coordinator.errors import Unavailable
from coordinator.queue_record import QueueRecord
from coordinator.store import Store

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueRecord]:
    passwords = queue_users.new_passwords()
    with EmbeddedServices(tmp_path_factory.mktemp("users"), access=Access(passwords=passwords)) as services:
        yield QueueRecord(nats_port=services.nats.port, redis_port=services.redis.port, passwords=passwords)


async def may_publish(bus: Bus, subject: str) -> bool:
    """Permissions are told on the connection's error channel; a message that comes through to a listener was allowed."""
    try:
        await bus.store(subject, b"x", {}, timeout_s=0.5)
    except Unavailable as error:
        return "no answer" not in str(error)
    return True


async def test_a_worker_extends_chains_and_a_master_does_not_and_neither_empties_a_stream(record: QueueRecord) -> None:
    worker_url, master_url = record.urls("worker").nats_url, record.urls("master").nats_url
    async with await Bus.connect(worker_url, "w") as worker, await Bus.connect(master_url, "m") as master:
        await worker.provision("m")
        assert await may_publish(worker, "out.o.w.1") and await may_publish(worker, "results.j1")
        assert not await may_publish(master, "out.o.w.2") and not await may_publish(master, "results.j2")
        assert await may_publish(master, "jobs.m.normal.any")
        for bus in (worker, master):
            for api, body in (("STREAM.PURGE.JOBS", {}), ("STREAM.PURGE.OUT", {}), ("STREAM.MSG.DELETE.OUT", {"seq": 1})):
                with pytest.raises(Unavailable, match="no answer"):
                    await bus.api(api, body, timeout_s=0.5)
    async with await Bus.connect(record.urls("operator").nats_url, "o") as operator:
        assert (await operator.api("STREAM.PURGE.JOBS"))["success"]


async def test_whoever_made_a_handle_and_whoever_watches_may_delete_it_when_it_is_void(record: QueueRecord) -> None:
    worker_url, master_url = record.urls("worker").nats_url, record.urls("master").nats_url
    async with await Bus.connect(worker_url, "w") as worker, await Bus.connect(master_url, "m") as master:
        await worker.provision("m")
        for bus in (worker, master):
            seq = await worker.publish_handoff("m", b"handle", lane="h-a")
            await worker.publish_handoff("m", b"handle", lane="h-a")
            async with asyncio.timeout(5):
                await bus.delete_handoff(seq)
                await bus.purge_handoff_lane("m", "h-a")
            assert await bus.host_lanes() == []


async def test_nobody_hears_what_another_role_is_told(record: QueueRecord) -> None:
    heard: list[str] = []
    worker_url, master_url = record.urls("worker").nats_url, record.urls("master").nats_url
    async with await Bus.connect(worker_url, "w") as worker, await Bus.connect(master_url, "m") as master:
        for subject in ("_INBOX_master.>", "live.>", "out.>", ">"):
            await worker.subscribe(subject, lambda message: heard.append(message.subject))
        await worker.flush()
        await master.flush()
        await master.publish("jobs.m.normal.any", b"")
        await master.flush()
        await asyncio.sleep(0.1)
    assert not [subject for subject in heard if not subject.startswith("_INBOX_worker")]


async def test_a_client_submits_and_reads_and_writes_nothing_else(record: QueueRecord) -> None:
    worker_url, client_url = record.urls("worker").nats_url, record.urls("client").nats_url
    async with await Bus.connect(worker_url, "w") as worker, await Bus.connect(client_url, "c") as client:
        await worker.provision("m")
        frames = asyncio.Event()
        await client.subscribe("live.me.>", lambda message: frames.set())
        await client.flush()
        assert await may_publish(client, "jobs.m.normal.any")
        for subject in ("out.me.w.1", "results.j3", "handoff.m.any", "dlq.m", "roster.w.1"):
            assert not await may_publish(client, subject), subject
        await worker.store("out.me.w.1", b"x", {})
        await asyncio.wait_for(frames.wait(), 10)


async def test_without_a_password_nobody_comes_in(record: QueueRecord) -> None:
    with pytest.raises(Unavailable, match="Authorization"):
        await Bus.connect(f"nats://127.0.0.1:{record.nats_port}", "stranger", timeout_s=1.0)
    stranger = Store(f"redis://127.0.0.1:{record.redis_port}")
    with pytest.raises(Unavailable, match="uthenticat"):
        await stranger.ping()
    await stranger.close()


async def test_scripts_run_as_every_role_and_nothing_else_of_the_server_is_open(record: QueueRecord) -> None:
    for role in ("master", "worker", "operator"):
        store = Store(record.urls(role).redis_url)
        await store.register(f"w-{role}", {"role": "both", "model": "m"})
        await store.close()
    with redis.Redis.from_url(record.urls("worker").redis_url) as client:
        for command in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["SET", "elsewhere", "1"], ["ACL", "LIST"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)


def test_what_has_passwords_in_it_is_readable_by_its_owner_only(record: QueueRecord, tmp_path: Path) -> None:
    record.write(tmp_path / "state" / "queue.json")
    assert (tmp_path / "state" / "queue.json").stat().st_mode & 0o077 == 0
