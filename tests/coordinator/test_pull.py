"""Raw pulls on a real nats-server: long polls, expiry, missing consumers, restarts; acks by subject from any connection."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from coordinator import subjects
from coordinator.bus import Bus, Delivery, Puller
from coordinator.embedded import EmbeddedServices
from coordinator.errors import Unavailable
from coordinator.messages import CLASSES, Job, JobClass, new_job_id
from coordinator.pull import parse_ack_subject

pytestmark = pytest.mark.services


def a_job(model: str, klass: JobClass = "normal") -> Job:
    return Job(job_id=new_job_id(), origin="o1", model=model, klass=klass, prompt_ids=(1, 2, 3))


async def publish(bus: Bus, model: str, num_jobs: int, klass: JobClass = "normal") -> list[str]:
    jobs = [a_job(model, klass) for _ in range(num_jobs)]
    for job in jobs:
        await bus.publish_job(job, deadline_s=20.0)
    return [job.job_id for job in jobs]


async def take(puller: Puller, num_deliveries: int) -> list[Delivery]:
    return [await puller.next() for _ in range(num_deliveries)]


def job_ids(deliveries: list[Delivery]) -> list[str]:
    return [Job.decode(delivery.data).job_id for delivery in deliveries]


@pytest.fixture
def consumer(model: str) -> str:
    return subjects.jobs_consumer(model, "normal")


@pytest.fixture
async def puller(bus: Bus) -> AsyncIterator[Puller]:
    async with await Puller.open(bus) as puller:
        yield puller


async def test_a_delivery_says_what_it_is(bus: Bus, model: str, puller: Puller, consumer: str) -> None:
    before_ms = time.time_ns() // 1_000_000
    seq = await bus.publish_job(a_job(model))
    await puller.pull(consumer, 1, 5.0)
    delivery = await puller.next()
    assert (delivery.subject, delivery.consumer) == (f"jobs.{model}.normal.any", consumer)
    assert (delivery.stream_seq, delivery.num_delivered) == (seq, 1)
    assert before_ms <= delivery.timestamp_ms <= time.time_ns() // 1_000_000
    info = parse_ack_subject(delivery.ack_subject)
    assert (info.stream, info.stream_seq, info.num_delivered, info.timestamp_ms) == ("JOBS", seq, 1, delivery.timestamp_ms)


async def test_long_polls_stand_on_several_consumers_at_once(bus: Bus, model: str, puller: Puller) -> None:
    for klass in CLASSES:
        puller.want(subjects.jobs_consumer(model, klass), 2)
    puller.want(subjects.handoff_consumer(model), 2)
    for klass in ("batch", "interactive", "normal"):
        await publish(bus, model, 1, klass)  # type: ignore[arg-type]
        assert (await puller.next()).subject == subjects.jobs(model, klass)
    await bus.publish_handoff(model, b"handle")
    assert (await puller.next()).data == b"handle"


async def test_no_more_than_wanted_is_delivered(bus: Bus, model: str, puller: Puller, consumer: str) -> None:
    published = await publish(bus, model, 10)
    puller.want(consumer, 4)
    first = await take(puller, 4)
    await bus.flush()
    assert puller.deliveries.empty() and puller.num_open(consumer) == 0
    puller.want(consumer, 6)
    assert job_ids(first + await take(puller, 6)) == published


async def test_a_pull_ends_with_its_reason(bus: Bus, model: str, puller: Puller, consumer: str) -> None:
    empty = await puller.pull(consumer, 5, 5.0, no_wait=True)
    assert await empty.ended == "empty"
    expired = await puller.pull(consumer, 5, 0.05)
    assert await expired.ended == "expired"
    missing = await puller.pull("jobs-nobody-normal-any", 1, 5.0)
    assert await missing.ended == "missing"
    await publish(bus, model, 3)
    filled = await puller.pull(consumer, 2, 5.0)
    assert await filled.ended == "filled"
    rest = await puller.pull(consumer, 5, 5.0, no_wait=True)
    assert await rest.ended in ("empty", "expired") and rest.num_left == 4
    assert puller.deliveries.qsize() == 3


async def test_a_standing_pull_is_renewed_when_it_expires(bus: Bus, model: str, puller: Puller, consumer: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.pull.STANDING_EXPIRES_S", 0.05)
    puller.want(consumer, 3)
    for _ in range(3):
        expired = await puller.pull(consumer, 1, 0.05)   # the standing one runs out beside it
        assert await expired.ended == "expired"
    published = await publish(bus, model, 3)
    assert job_ids(await take(puller, 3)) == published


async def test_a_consumer_that_is_made_later_is_found(bus: Bus, puller: Puller) -> None:
    late = "latecomer"
    missing = await puller.pull(subjects.jobs_consumer(late, "batch"), 1, 5.0)
    puller.want(subjects.jobs_consumer(late, "batch"), 1)
    assert await missing.ended == "missing"
    await bus.provision(late)
    published = await publish(bus, late, 1, "batch")
    assert job_ids([await puller.next()]) == published


async def test_a_cancelled_wait_loses_nothing(bus: Bus, model: str, puller: Puller, consumer: str) -> None:
    puller.want(consumer, 40)
    published, got = [], []
    for _ in range(40):
        waiting = asyncio.create_task(puller.next())
        published += await publish(bus, model, 1)
        waiting.cancel()
        try:
            got.append(await waiting)
        except asyncio.CancelledError:
            got.append(await puller.next())
    assert job_ids(got) == published


async def test_closing_gives_back_what_was_not_taken(bus: Bus, model: str, consumer: str, nats_url: str) -> None:
    published = await publish(bus, model, 6)
    async with await Puller.open(bus) as first:
        pull = await first.pull(consumer, 4, 5.0)
        await pull.ended
        await (await first.next()).ack_sync()
    async with await Bus.connect(nats_url, "second") as other, await Puller.open(other) as second:
        second.want(consumer, 5)
        again = await take(second, 5)
        assert sorted(job_ids(again)) == sorted(published[1:])
        for delivery in again:
            await delivery.ack_sync()
    assert (await bus.counters(model))["jobs"]["normal"] == 0
    with pytest.raises(Unavailable, match="the puller was closed"):
        await first.pull(consumer, 1, 1.0)


async def test_a_connection_that_closes_takes_its_pulls_along(bus: Bus, model: str, consumer: str, nats_url: str) -> None:
    async with await Bus.connect(nats_url, "gone") as gone:
        puller = await Puller.open(gone)
        await puller.pull(consumer, 5, 60.0)
        await gone.flush()
    published = await publish(bus, model, 2)
    async with await Puller.open(bus) as ours:
        ours.want(consumer, 2)
        assert job_ids(await take(ours, 2)) == published


async def test_every_job_comes_once_acked_over_kills_of_the_broker(own_services: EmbeddedServices) -> None:
    url = own_services.nats_url
    async with await Bus.connect(url, "producer") as producer, await Bus.connect(url, "worker") as worker:
        await producer.provision("m")
        consumer = subjects.jobs_consumer("m", "normal")
        done: set[str] = set()
        progress = asyncio.Event()
        async with await Puller.open(worker) as puller:
            puller.want(consumer, 8)

            async def work() -> None:
                while True:
                    delivery = await puller.next()
                    await delivery.ack_sync(deadline_s=20.0)
                    done.update(job_ids([delivery]))
                    progress.set()
                    puller.want(consumer, 8)

            working = asyncio.create_task(work())
            published: list[str] = []
            for _ in range(3):
                published += await publish(producer, "m", 20)
                await asyncio.to_thread(own_services.restart_nats)
                published += await publish(producer, "m", 20)
            while len(done) < len(published):
                progress.clear()
                await progress.wait()
            working.cancel()
        assert done == set(published)
        counters = await producer.counters("m")
        assert (counters["jobs"]["normal"], counters["jobs_ack_pending"]["normal"]) == (0, 0)


async def test_a_long_poll_that_waits_over_a_restart_gets_the_next_job(own_services: EmbeddedServices) -> None:
    async with await Bus.connect(own_services.nats_url, "worker") as bus:
        await bus.provision("m")
        async with await Puller.open(bus) as puller:
            puller.want(subjects.jobs_consumer("m", "normal"), 1)
            once = await puller.pull(subjects.jobs_consumer("m", "batch"), 1, 60.0)
            await bus.flush()
            await asyncio.to_thread(own_services.restart_nats)
            normal, batch = await publish(bus, "m", 1), await publish(bus, "m", 1, "batch")
            assert set(job_ids(await take(puller, 2))) == {*normal, *batch}
            assert await once.ended == "filled"


# --- acknowledgements ------------------------------------------------------------------------------------------------------


async def test_any_connection_may_answer_by_ack_subject(bus: Bus, model: str, puller: Puller, consumer: str, nats_url: str) -> None:
    await publish(bus, model, 3)
    puller.want(consumer, 3)
    acked, naked, termed = await take(puller, 3)
    async with await Bus.connect(nats_url, "coordinator") as other:
        await other.progress(acked.ack_subject)
        await other.ack_sync(acked.ack_subject)
        await other.ack(acked.ack_subject)   # a stale ack is harmless
        await other.term(termed.ack_subject, "not\nserved")
        await other.nak(naked.ack_subject)
        await other.flush()
    puller.want(consumer, 1)
    again = await puller.next()
    assert (again.stream_seq, again.num_delivered) == (naked.stream_seq, 2)
    await again.ack_sync()
    assert (await bus.counters(model))["jobs"]["normal"] == 0


async def test_a_delayed_nak_comes_back_after_the_delay(bus: Bus, model: str, puller: Puller, consumer: str) -> None:
    await publish(bus, model, 1)
    puller.want(consumer, 2)
    first = await puller.next()
    await first.in_progress()
    await first.nak(delay_s=0.3)
    again = await puller.next()
    assert again.num_delivered == 2 and again.received_s - first.received_s >= 0.3
    await again.term("enough")
    await bus.flush()
    assert (await bus.counters(model))["jobs"]["normal"] == 0


def test_ack_subjects_are_read_with_and_without_domain() -> None:
    plain = parse_ack_subject("$JS.ACK.JOBS.jobs-m-batch-any.2.17.21.1795456208352271767.3")
    assert (plain.stream, plain.consumer, plain.num_delivered, plain.stream_seq) == ("JOBS", "jobs-m-batch-any", 2, 17)
    assert (plain.num_pending, plain.timestamp_ms) == (3, 1795456208352)
    assert parse_ack_subject("$JS.ACK.hub.ACCHASH.JOBS.jobs-m-batch-any.2.17.21.1795456208352271767.3.rnd") == plain
    for bad in ("", "jobs.m.normal.any", "$JS.ACK.JOBS.c.1", "$JS.ACK.JOBS.c.x.1.1.1.1"):
        with pytest.raises(ValueError, match=r"not an ack subject|invalid literal"):
            parse_ack_subject(bad)
