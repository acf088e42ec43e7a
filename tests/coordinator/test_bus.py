"""The bus over a real nats-server: streams, jobs, results, dead letters, roster, and a connection that stays usable."""

import asyncio
import time

import pytest

from coordinator import subjects
from coordinator.bus import Bus, Message, NobodyListens
from coordinator.connection import ApiError
from coordinator.embedded import EmbeddedServices
from coordinator.errors import ConfigError, InvalidField, MalformedMessage, PayloadTooLarge, QueueFull, Unavailable
from coordinator.messages import CLASSES, DeadLetter, FinalRecord, Job, new_job_id, pack_floats, pack_ids
from coordinator.pull import Puller

pytestmark = pytest.mark.services


def a_job(model: str, **changes: object) -> Job:
    values: dict[str, object] = {"job_id": new_job_id(), "origin": "o1", "model": model, "prompt_ids": (1, 2, 3), **changes}
    return Job(**values)  # type: ignore[arg-type]


def a_record(job_id: str, **changes: object) -> FinalRecord:
    values: dict[str, object] = {
        "job_id": job_id, "origin": "o1", "model": "m", "reason": "stop", "error": "", "epoch": 1, "prompt_tokens": 3, "cached_tokens": 0,
        "token_ids": pack_ids([7]), "logprobs": pack_floats([-0.5]), "texts": ("x",), "workers": ("w.1",), **changes}
    return FinalRecord(**values)  # type: ignore[arg-type]


def a_letter(payload: bytes, reason: str = "garbage") -> DeadLetter:
    return DeadLetter(subject="jobs.m.normal.any", reason=reason, payload=payload, at_ms=time.time_ns() // 1_000_000, job_id="j1")


# --- provisioning ----------------------------------------------------------------------------------------------------------


async def test_provisioning_makes_the_farm_once_and_says_so_once(nats_url: str) -> None:
    async with await Bus.connect(nats_url, "test") as bus:
        assert await bus.provision("m1")
        assert not await bus.provision("m1")
        assert not await bus.provision("m2")
        assert set((await bus.api("STREAM.NAMES"))["streams"]) == {"JOBS", "HANDOFF", "OUT", "RESULTS", "DLQ", "ROSTER"}
        assert set((await bus.api("CONSUMER.NAMES.JOBS"))["consumers"]) == {
            subjects.jobs_consumer(model, klass, lane) for model in ("m1", "m2") for klass in CLASSES for lane in subjects.job_lanes()}
        assert set((await bus.api("CONSUMER.NAMES.HANDOFF"))["consumers"]) == {
            f"handoff-{model}-{lane}" for model in ("m1", "m2") for lane in ("any", "background")}


async def test_of_many_processes_that_provision_at_once_exactly_one_made_the_farm(nats_url: str) -> None:
    buses = [await Bus.connect(nats_url, f"test {i}") for i in range(8)]
    try:
        made = await asyncio.gather(*(bus.provision("m") for bus in buses))
        assert sorted(made) == [False] * 7 + [True]
    finally:
        await asyncio.gather(*(bus.close() for bus in buses))


async def test_streams_and_consumers_have_the_settings_that_the_protocol_rests_on(bus: Bus, model: str) -> None:
    async def config(stream: str) -> dict[str, object]:
        return dict((await bus.api(f"STREAM.INFO.{stream}"))["config"])

    jobs, handoff, out, roster = await config("JOBS"), await config("HANDOFF"), await config("OUT"), await config("ROSTER")
    assert (jobs["retention"], jobs["discard"], jobs["discard_new_per_subject"], jobs["max_age"]) == ("workqueue", "new", True, 0)
    assert jobs["max_msgs_per_subject"] == subjects.DEFAULT_MAX_QUEUED
    assert (handoff["retention"], handoff["max_age"]) == ("workqueue", 0)
    assert (out["retention"], out["allow_direct"], out["republish"]) == ("limits", True, {"src": "out.>", "dest": "live.>"})
    assert out["max_age"] == 3600 * 10**9 and int(str(out["max_bytes"])) > 0
    assert roster["max_msgs_per_subject"] == 1
    for stream in (subjects.JOBS, subjects.HANDOFF, subjects.OUT, subjects.RESULTS, subjects.DLQ, subjects.ROSTER):
        assert (await config(stream))["storage"] == "file"   # memory streams vanish with the server
    consumer = (await bus.api(f"CONSUMER.INFO.JOBS.jobs-{model}-batch-any"))["config"]
    assert (consumer["ack_policy"], consumer["ack_wait"]) == ("explicit", subjects.ACK_WAIT_S * 10**9)
    assert (consumer["max_ack_pending"], consumer["max_deliver"]) == (1_000_000, -1)


async def test_provisioning_repairs_what_matters_and_leaves_the_operators_sizes(bus: Bus, model: str) -> None:
    out = (await bus.api("STREAM.INFO.OUT"))["config"]
    del out["republish"]
    await bus.api("STREAM.UPDATE.OUT", {**out, "max_bytes": 10**8})
    consumer = (await bus.api(f"CONSUMER.INFO.JOBS.jobs-{model}-batch-any"))["config"]
    await bus.api(f"CONSUMER.CREATE.JOBS.jobs-{model}-batch-any.{subjects.jobs(model, 'batch')}",
                  {"stream_name": "JOBS", "config": {**consumer, "max_ack_pending": 5}, "action": "update"})
    await bus.provision(model, max_queued=7)
    out = (await bus.api("STREAM.INFO.OUT"))["config"]
    assert (out["republish"], out["max_bytes"]) == ({"src": "out.>", "dest": "live.>"}, 10**8)
    assert (await bus.api(f"CONSUMER.INFO.JOBS.jobs-{model}-batch-any"))["config"]["max_ack_pending"] == 1_000_000
    await bus.provision(model)
    assert (await bus.api("STREAM.INFO.JOBS"))["config"]["max_msgs_per_subject"] == 7


async def test_a_foreign_stream_of_the_same_name_is_a_clear_error(nats_url: str) -> None:
    async with await Bus.connect(nats_url, "test") as bus:
        await bus.api("STREAM.CREATE.JOBS", {"name": "JOBS", "subjects": ["jobs.>"], "retention": "limits", "storage": "file"})
        with pytest.raises(ConfigError, match="stream JOBS exists with settings that cannot be brought in line"):
            await bus.provision("m")
        with pytest.raises(InvalidField, match="model"):
            await bus.provision("a.b")


async def test_a_server_that_is_too_old_or_takes_only_small_messages_is_named(bus: Bus, model: str, monkeypatch: pytest.MonkeyPatch,
                                                                             caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("coordinator.subjects.MAX_PAYLOAD_BYTES", 16 * 1024 * 1024)
    await bus.provision(model)
    assert "takes messages of at most 8384512 bytes: set max_payload" in caplog.text
    monkeypatch.setattr("coordinator.provisioning.LEAST_SERVER_VERSION", (99, 0))
    with pytest.raises(ConfigError, match=r"nats-server at nats://.* is 2\.\d+: 99\.0 or newer is needed"):
        await bus.provision(model)


# --- jobs ------------------------------------------------------------------------------------------------------------------


async def test_a_job_published_twice_is_queued_once_and_a_replay_is_queued_again(bus: Bus, model: str) -> None:
    job = a_job(model, klass="interactive")
    first = await bus.publish_job(job)
    assert await bus.publish_job(job) == first
    assert (await bus.counters(model))["jobs"] == {"interactive": 1, "normal": 0, "batch": 0}
    assert await bus.publish_job(job, message_id="replay-1") > first
    assert (await bus.counters(model))["jobs_pending"]["interactive"] == 2


async def test_a_full_queue_refuses_and_accepts_again_after_an_ack(bus: Bus, model: str) -> None:
    await bus.provision(model, max_queued=2)
    for _ in range(2):
        await bus.publish_job(a_job(model))
    late = a_job(model)
    with pytest.raises(QueueFull, match=f"jobs.{model}.normal.any is full"):
        await bus.publish_job(late)
    await bus.publish_job(a_job(model, klass="batch"))   # each class has its own bound
    async with await Puller.open(bus) as puller:
        puller.want(subjects.jobs_consumer(model, "normal"), 1)
        delivery = await puller.next()
        with pytest.raises(QueueFull):   # at work is not done
            await bus.publish_job(late)
        await delivery.ack_sync()
    await bus.publish_job(late)


async def test_jobs_of_two_models_do_not_meet(bus: Bus, model: str) -> None:
    await bus.provision("other")
    await bus.publish_job(a_job(model))
    await bus.publish_handoff("other", b"handle")
    mine, others = await bus.counters(model), await bus.counters("other")
    assert (mine["jobs"]["normal"], mine["handoff"], others["jobs"]["normal"], others["handoff"]) == (1, 0, 0, 1)
    assert (mine["jobs_pending"]["normal"], others["handoff_pending"], mine["dlq"]) == (1, 1, 0)


@pytest.mark.parametrize("headers", [None, {"Key": "v" * 6000}])
async def test_an_oversize_message_is_refused_and_the_connection_goes_on(bus: Bus, headers: dict[str, str] | None) -> None:
    limit = 8 * 1024 * 1024
    with pytest.raises(PayloadTooLarge) as caught:
        await bus.publish("anywhere", b"x" * (limit - (0 if headers is None else 5000)), headers=headers)
    assert caught.value.size > caught.value.limit == limit - 4096
    with pytest.raises(PayloadTooLarge):
        await bus.publish_handoff("m", b"x" * limit)
    await bus.flush()
    assert bus.is_connected


async def test_a_message_just_under_the_limit_arrives(bus: Bus, model: str) -> None:
    await bus.publish_handoff(model, b"x" * (bus.max_message_bytes - 64))
    assert (await bus.counters(model))["handoff"] == 1


async def test_a_publish_during_an_outage_is_stored_once_when_the_broker_is_back(own_services: EmbeddedServices) -> None:
    async with await Bus.connect(own_services.nats_url, "test") as bus:
        await bus.provision("m")
        own_services.nats.kill()
        job = a_job("m")
        with pytest.raises(Unavailable):
            await bus.publish_job(job, deadline_s=0.1)
        publishing = asyncio.create_task(bus.publish_job(job, deadline_s=20.0))
        await asyncio.to_thread(own_services.nats.start)
        await publishing
        assert (await bus.counters("m"))["jobs"]["normal"] == 1


# --- results ---------------------------------------------------------------------------------------------------------------


async def test_the_first_final_record_stands_and_later_writers_get_it(bus: Bus) -> None:
    job_id = new_job_id()
    assert await bus.get_result(job_id) is None
    first, second = a_record(job_id), a_record(job_id, reason="length")
    assert await bus.put_result(first) == first
    assert await bus.put_result(first) == first
    assert await bus.put_result(second) == first
    assert await bus.get_result(job_id) == first


async def test_of_concurrent_writers_all_see_one_record(bus: Bus) -> None:
    job_id = new_job_id()
    stored = await asyncio.gather(*(bus.put_result(a_record(job_id, epoch=epoch)) for epoch in range(1, 9)))
    assert len(set(stored)) == 1 and await bus.get_result(job_id) == stored[0]


# --- dead letters ----------------------------------------------------------------------------------------------------------


async def test_dead_letters_are_listed_by_page_read_and_deleted(bus: Bus, model: str) -> None:
    letters = [a_letter(f"payload {i}".encode()) for i in range(5)]
    seqs = [await bus.dead_letter(letter, model) for letter in letters]
    await bus.dead_letter(a_letter(b"other"), "other")
    assert await bus.dlq_list(model) == list(zip(seqs, letters, strict=True))
    page = await bus.dlq_list(model, limit=2)
    assert [seq for seq, _ in page + await bus.dlq_list(model, after_seq=page[-1][0], limit=2)] == seqs[:4]
    assert await bus.dlq_get(seqs[1]) == letters[1]
    assert await bus.dlq_delete(seqs[1]) and not await bus.dlq_delete(seqs[1])
    assert await bus.dlq_get(seqs[1]) is None
    assert (await bus.counters(model))["dlq"] == 4


async def test_a_dead_letter_as_large_as_a_message_may_be_is_cut_and_says_so(bus: Bus, model: str) -> None:
    payload = bytes(8 * 1024 * 1024)
    letter = await bus.dlq_get(await bus.dead_letter(a_letter(payload, "x" * 5000), model))
    assert letter is not None
    assert letter.reason.endswith("(payload of 8388608 bytes was cut)") and 8_300_000 < len(letter.payload) < len(payload)


async def test_an_unreadable_dlq_entry_hides_no_other(bus: Bus, model: str) -> None:
    seq = await bus.store(subjects.dead_letter(model), b"\xc1garbage", {})
    good = await bus.dead_letter(a_letter(b"p"), model)
    assert [found for found, _ in await bus.dlq_list(model)] == [good]
    with pytest.raises(MalformedMessage):
        await bus.dlq_get(seq)
    assert await bus.dlq_delete(seq)


# --- roster ----------------------------------------------------------------------------------------------------------------


async def test_the_roster_names_each_incarnation_once(bus: Bus) -> None:
    for worker, incarnation in [("w2", 1), ("w1", 3), ("w1", 12), ("w1", 3)]:
        await bus.roster_add(worker, incarnation)
    assert await bus.roster() == [("w1", 3), ("w1", 12), ("w2", 1)]


# --- core ------------------------------------------------------------------------------------------------------------------


async def test_flush_is_a_barrier_for_subscriptions(bus: Bus, nats_url: str) -> None:
    async def echo(message: Message) -> None:
        await bus.publish(message.reply, message.data)

    async with await Bus.connect(nats_url, "asker") as asker:
        for i in range(300):
            subscription = await bus.subscribe(f"echo.{i}", echo)
            await bus.flush()
            assert await asker.request(f"echo.{i}", b"hi") == b"hi"
            await subscription.close()


async def test_a_request_that_nobody_takes_says_so_at_once(bus: Bus) -> None:
    with pytest.raises(NobodyListens, match=r"nobody listens on kv\.w\.1"):
        await bus.request("kv.w.1", b"", timeout_s=30.0)


async def test_a_request_without_answer_times_out(bus: Bus) -> None:
    await bus.subscribe("silent", lambda _: None)
    with pytest.raises(Unavailable, match=r"no answer from silent within 0\.05 s"):
        await bus.request("silent", b"", timeout_s=0.05)


async def test_waiting_requests_fail_at_once_when_the_broker_dies_and_subscriptions_come_back(own_services: EmbeddedServices) -> None:
    gaps, heard = asyncio.Event(), asyncio.Event()

    async with await Bus.connect(own_services.nats_url, "test") as bus:
        await bus.subscribe("silent", lambda _: None)
        await bus.subscribe("news", lambda _: heard.set(), on_gap=gaps.set)
        request = asyncio.create_task(bus.request("silent", b"", timeout_s=1000.0))
        await bus.flush()
        await asyncio.to_thread(own_services.nats.kill)
        with pytest.raises(Unavailable, match="lost"):
            await request
        await asyncio.to_thread(own_services.nats.start)
        await gaps.wait()
        await bus.publish("news")
        await heard.wait()


async def test_a_handler_that_fails_does_not_stop_its_subscription(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    def handle(message: Message) -> None:
        if message.data == b"bad":
            raise RuntimeError("handler bug")
        heard.put_nowait(message.data)

    await bus.subscribe("news", handle)
    await bus.publish("news", b"bad")
    await bus.publish("news", b"good")
    assert await heard.get() == b"good"
    assert "a message on news broke its handler" in caplog.text


async def test_closing_a_subscription_handles_all_that_had_been_sent(bus: Bus, nats_url: str) -> None:
    heard: list[bytes] = []
    subscription = await bus.subscribe("news", lambda message: heard.append(message.data))
    await bus.flush()
    async with await Bus.connect(nats_url, "writer") as writer:
        for i in range(500):
            await writer.publish("news", str(i).encode())
        await writer.flush()
    await subscription.close()
    assert heard == [str(i).encode() for i in range(500)]


async def test_a_cancelled_flush_or_request_leaves_the_connection_usable(bus: Bus) -> None:
    for _ in range(50):
        waiting = asyncio.create_task(bus.flush())
        await asyncio.sleep(0)
        waiting.cancel()
    await bus.flush()
    assert bus.is_connected


async def test_no_server_is_unavailable_with_the_reason_and_no_traceback(caplog: pytest.LogCaptureFixture,
                                                                           capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unavailable, match=r"NATS at nats://127.0.0.1:1 did not answer within 0.2 s: .*Connect call failed"):
        await Bus.connect("nats://user:secret@127.0.0.1:1", "test", timeout_s=0.2)
    assert "secret" not in caplog.text
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_an_outage_is_two_log_lines_without_traceback(own_services: EmbeddedServices, end: str,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "coordinator")
    async with await Bus.connect(own_services.nats_url, "w1") as bus:
        await asyncio.to_thread(getattr(own_services.nats, end))
        await asyncio.to_thread(own_services.nats.start)
        with pytest.raises(Unavailable):
            await bus.request("nobody", timeout_s=5.0)
        await bus.flush()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("coordinator")]
    assert [line.split(",")[0] for line in lines[:1]] == ["NATS connection w1: lost"]
    assert len(lines) == 2 and "back after" in lines[1] and "Traceback" not in caplog.text


async def test_after_close_everything_says_closed(nats_url: str) -> None:
    fatal: list[Exception] = []
    bus = await Bus.connect(nats_url, "test", fatal.append)
    await bus.subscribe("silent", lambda _: None)
    request = asyncio.create_task(bus.request("silent", b"", timeout_s=1000.0))
    await bus.flush()
    await bus.close()
    await bus.close()
    with pytest.raises(Unavailable, match="closed"):
        await request
    for operation in (bus.publish("x"), bus.flush(), bus.publish_handoff("m", b""), bus.counters("m")):
        with pytest.raises(Unavailable, match="closed"):
            await operation
    assert fatal == []


async def test_a_connection_that_the_server_ends_for_good_is_reported_once(nats_url: str) -> None:
    fatal: asyncio.Queue[Exception] = asyncio.Queue()
    bus = await Bus.connect(nats_url, "test", fatal.put_nowait)
    await bus._client._send_command(b"NONSENSE\r\n")
    await bus._client._flush_pending()
    error = await fatal.get()
    assert isinstance(error, Unavailable) and "unknown protocol operation" in str(error)
    with pytest.raises(Unavailable, match="unknown protocol operation"):
        await bus.request("x")
    await bus.close()
    assert fatal.empty()


async def test_an_error_of_the_broker_carries_its_code(bus: Bus) -> None:
    with pytest.raises(ApiError, match="stream not found") as caught:
        await bus.api("STREAM.INFO.NOPE")
    assert (caught.value.code, caught.value.err_code, caught.value.may_pass) == (404, 10059, False)


async def test_consumers_of_a_workers_lane_go_by_themselves_and_their_jobs_stay(bus: Bus, model: str) -> None:
    await bus.ensure_lane(model, "w-one")
    await bus.ensure_lane(model, "w-one")
    config = (await bus.api(f"CONSUMER.INFO.JOBS.jobs-{model}-normal-w-one"))["config"]
    assert config["inactive_threshold"] == 3600 * 10**9
    await bus.publish_job(Job(job_id="a", origin="o", model=model, prompt_ids=(1,)), lane="w-one")
    await bus.api(f"CONSUMER.DELETE.JOBS.jobs-{model}-normal-w-one")
    assert await bus.private_lanes() == [(model, "w-one")]
    await bus.ensure_lane(model, "w-one")
    assert (await bus.lane_state(model, "w-one"))["pending"] == 1
    assert (await bus.counters(model))["jobs"]["normal"] == 1
