"""The producer's client against a real nats-server and a worker that answers by formula."""

import asyncio
from collections.abc import AsyncIterator, Awaitable

import pytest

from coordinator.bus import Bus, Message
from coordinator.embedded import EmbeddedServices
from coordinator.errors import InvalidField, JobFailed, PayloadTooLarge, QueueFull, ReadElsewhere, Unavailable, UnknownJob
from coordinator.messages import Job
from coordinator.sampling import SamplingParams
from producers import job_stream
from producers.client import JobHandle, Token, TokenmillClient
from tests.producers.fake_worker import FakeWorker, all_at_once, answer, run, token_id

pytestmark = pytest.mark.services


@pytest.fixture
async def client(bus: Bus, nats_url: str, model: str) -> AsyncIterator[TokenmillClient]:
    async with await TokenmillClient.connect(nats_url, model=model) as client:
        yield client


def length(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens)


async def read(handle: JobHandle) -> list[Token]:
    return [token async for token in handle.stream()]


def assert_whole(tokens: list[Token], job_id: str, count: int) -> None:
    """Each token once, in order, none missing."""
    assert [(t.index, t.id) for t in tokens] == [(i, token_id(job_id, i)) for i in range(count)]
    assert "".join(t.text for t in tokens) == answer(job_id, count)


async def test_two_hundred_streams_see_every_token_once_in_order(client: TokenmillClient, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        handles = await asyncio.gather(*(client.submit([1, 2, 3], length(8)) for _ in range(200)))
        streams = await asyncio.gather(*(read(handle) for handle in handles))
    for handle, tokens in zip(handles, streams, strict=True):
        assert_whole(tokens, handle.job_id, 8)
        assert tokens[-1].finish == "length" and [t.finish for t in tokens[:-1]] == [None] * 7
    assert client.num_open == 0


async def test_a_result_is_the_whole_answer(client: TokenmillClient, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        handle = await client.submit([1, 2, 3], length(5))
        result = await handle.result()
    assert (result.text, result.reason, result.prompt_tokens) == (answer(handle.job_id, 5), "length", 3)
    assert result.logprobs == tuple(-0.25 * (i + 1) for i in range(5))
    assert (await client.final_record(handle.job_id)).text == result.text


async def test_a_result_can_still_be_had_after_the_stream_was_read(client: TokenmillClient, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        handle = await client.submit([1], length(5))
        await read(handle)
        assert (await handle.result()).text == answer(handle.job_id, 5)


async def test_a_job_carries_what_was_submitted_and_always_a_seed(client: TokenmillClient, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model, serve=all_at_once) as worker:
        await (await client.submit("hello", SamplingParams(top_k=5), klass="batch", timeout_s=60, tenant="t")).result()
    job = worker.jobs[0]
    assert (job.text, job.prompt_ids, job.klass, job.tenant, job.params.top_k) == ("hello", None, "batch", "t", 5)
    assert job.params.seed is not None and job.deadline_ms == job.created_ms + 60_000


async def test_repeats_from_a_second_epoch_on_another_chain_are_hidden(client: TokenmillClient, bus: Bus, model: str) -> None:
    second = FakeWorker(bus, model, name="second")

    async def die_in_the_middle(worker: FakeWorker, job: Job) -> None:
        await worker.append(run(job, 0, 2), origin=job.origin)
        await worker.append(run(job, 2, 3), origin=job.origin)
        await second.append(run(job, 1, 4, epoch=2), origin=job.origin)
        await worker.append(run(job, 3, 2), origin=job.origin)
        await second.append(run(job, 0, 9, epoch=2, finish="length"), origin=job.origin)

    async with FakeWorker(bus, model, serve=die_in_the_middle):
        handle = await client.submit([1], length(9))
        assert_whole(await read(handle), handle.job_id, 9)


async def test_runs_that_come_in_another_order_are_shown_in_order(client: TokenmillClient, bus: Bus, model: str) -> None:
    async def shuffled(worker: FakeWorker, job: Job) -> None:
        for first, count, finish in ((4, 2, None), (2, 2, None), (6, 1, "stop"), (0, 3, None)):
            await worker.append(run(job, first, count, finish=finish), origin=job.origin)  # type: ignore[arg-type]

    async with FakeWorker(bus, model, serve=shuffled):
        handle = await client.submit([1], length(9))
        assert_whole(await read(handle), handle.job_id, 7)


async def test_a_lost_frame_is_read_again_from_its_chain(nats_url: str, bus: Bus, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_frames(monkeypatch, {1, 3})
    async with FakeWorker(bus, model), await TokenmillClient.connect(nats_url, model=model) as client:
        handle = await client.submit([1], length(6))
        assert_whole(await read(handle), handle.job_id, 6)
        assert client.catch_up.num_rereads >= 1


async def test_a_lost_last_frame_is_made_up_from_the_final_record(nats_url: str, bus: Bus, model: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    lose_frames(monkeypatch, {0})
    async with FakeWorker(bus, model, serve=all_at_once), await TokenmillClient.connect(nats_url, model=model) as client:
        handle = await client.submit([1], length(6))
        assert_whole(await read(handle), handle.job_id, 6)


def lose_frames(monkeypatch: pytest.MonkeyPatch, lost: set[int]) -> None:
    """Throw away the live frames with these numbers, as a connection that broke for a moment does."""
    take, num_seen = TokenmillClient._on_frame, 0

    def drop_some(client: TokenmillClient, message: Message) -> Awaitable[None] | None:
        nonlocal num_seen
        num_seen += 1
        return take(client, message) if num_seen - 1 not in lost else None

    monkeypatch.setattr(TokenmillClient, "_on_frame", drop_some)


async def test_a_slow_reader_holds_a_bounded_buffer_and_still_sees_everything(client: TokenmillClient, bus: Bus, model: str,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_stream, "MAX_UNREAD_TOKENS", 100)
    has_emitted = asyncio.Event()

    async def flood(worker: FakeWorker, job: Job) -> None:
        for first in range(0, 1000, 50):
            await worker.emit(job, run(job, first, 50, finish="length" if first == 950 else None))
        has_emitted.set()

    async with FakeWorker(bus, model, serve=flood):
        handle = await client.submit([1], length(1000))
        await has_emitted.wait()
        await client.bus.flush()
        assert handle.tokens.num_unread == 100
        assert_whole(await read(handle), handle.job_id, 1000)


async def test_submitting_the_same_job_again_shows_the_first_answer(client: TokenmillClient, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model) as worker:
        for _ in range(2):
            handle = await client.submit([1], length(4), job_id="mine")
            assert_whole(await read(handle), "mine", 4)
    assert len(worker.jobs) == 1


async def test_a_job_submitted_again_while_it_is_open_is_read_by_the_newer_handle(client: TokenmillClient, bus: Bus, model: str) -> None:
    first = await client.submit([1], job_id="mine")
    second = await client.submit([1], job_id="mine")
    assert first.is_superseded and not second.is_superseded
    assert sum((await bus.counters(model))["jobs"].values()) == 1
    with pytest.raises(ReadElsewhere, match="another request"):
        await first.result()


@pytest.mark.parametrize(("reason", "error"), [("cancelled", ""), ("expired", ""), ("error", "max_new_tokens: the pool is too small")])
async def test_a_job_that_fails_says_so_after_its_last_token(client: TokenmillClient, bus: Bus, model: str,
                                                             reason: str, error: str) -> None:
    async def fail(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 2))
        await worker.emit(job, run(job, 2, 0, finish=reason, error=error))  # type: ignore[arg-type]

    seen = []
    async with FakeWorker(bus, model, serve=fail):
        handle = await client.submit([1], length(4))
        with pytest.raises(JobFailed) as failed:
            async for token in handle.stream():
                seen.append(token)  # noqa: PERF401
    assert_whole(seen, handle.job_id, 2)
    assert (failed.value.reason, failed.value.error) == (reason, error)


async def test_leaving_a_job_early_cancels_it(client: TokenmillClient, bus: Bus, model: str) -> None:
    async def first_token_only(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 1))

    async with FakeWorker(bus, model, serve=first_token_only) as worker:
        async with await client.submit([1], length(4)) as handle:
            async for _ in handle.stream():
                break
        assert await worker.cancelled.get() == handle.job_id
    assert client.num_open == 0


async def test_a_full_queue_refuses_at_once(nats_url: str, bus: Bus, model: str) -> None:
    async with await TokenmillClient.connect(nats_url, model=model, max_queued=2) as client:
        for _ in range(2):
            await client.submit([1])
        with pytest.raises(QueueFull):
            await client.submit([1])
        assert client.num_open == 2


async def test_a_prompt_over_the_brokers_limit_is_refused(client: TokenmillClient) -> None:
    with pytest.raises(PayloadTooLarge):
        await client.submit("x" * 9_000_000)


@pytest.mark.parametrize(("prompt", "job_id", "field"), [
    ("", None, "prompt"), ([], None, "prompt"), ([1], "a b", "job_id"), ([1], "", "job_id")])
async def test_what_is_no_job_is_refused_by_name(client: TokenmillClient, prompt: str, job_id: str | None, field: str) -> None:
    with pytest.raises(InvalidField) as refused:
        await client.submit(prompt, job_id=job_id)
    assert refused.value.field == field


async def test_a_job_that_nobody_takes_expires(client: TokenmillClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producers.catch_up.DEADLINE_GRACE_S", 0.1)
    handle = await client.submit([1], timeout_s=0.1)
    assert (await handle.result()).reason == "expired"


async def test_no_broker_is_a_clear_error(model: str) -> None:
    with pytest.raises(Unavailable):
        await TokenmillClient.connect("nats://127.0.0.1:1", model=model, connect_timeout_s=0.2)


async def test_streams_go_on_over_a_broker_that_is_killed_and_comes_back(own_services: EmbeddedServices, model: str) -> None:
    is_half_way, go_on = asyncio.Event(), asyncio.Event()
    num_half_way = 0

    async def pause_half_way(worker: FakeWorker, job: Job) -> None:
        nonlocal num_half_way
        for i in range(10):
            if i == 5:
                num_half_way += 1
                if num_half_way == 20:
                    is_half_way.set()
                await go_on.wait()
            await worker.emit(job, run(job, i, 1, finish="length" if i == 9 else None))

    async with (await TokenmillClient.connect(own_services.nats_url, model=model) as client,
                await Bus.connect(own_services.nats_url, "worker") as bus, FakeWorker(bus, model, serve=pause_half_way)):
        handles = [await client.submit([1], length(10)) for _ in range(20)]
        reading = asyncio.gather(*(read(handle) for handle in handles))
        await is_half_way.wait()
        own_services.nats.kill()
        go_on.set()  # the workers' next frames meet a dead broker
        await asyncio.to_thread(own_services.nats.start)
        for handle, tokens in zip(handles, await reading, strict=True):
            assert_whole(tokens, handle.job_id, 10)


async def test_a_reader_that_comes_back_by_index_is_shown_the_rest(nats_url: str, redis_url: str, bus: Bus, model: str) -> None:
    go_on = asyncio.Event()

    async def pause(worker: FakeWorker, job: Job) -> None:
        await worker.emit(job, run(job, 0, 4))
        await go_on.wait()
        await worker.emit(job, run(job, 4, 4, finish="length"))

    async with FakeWorker(bus, model, serve=pause):
        async with await TokenmillClient.connect(nats_url, redis_url, model=model) as first:
            handle = await first.submit([1], length(8))
            stream = handle.stream()
            seen = [await anext(stream) for _ in range(3)]
        async with await TokenmillClient.connect(nats_url, redis_url, model=model) as second:
            go_on.set()
            seen += [token async for token in second.stream(handle.job_id, next_index=3)]
            assert_whole(seen, handle.job_id, 8)
            assert (await second.result(handle.job_id)).text == answer(handle.job_id, 8)
            again = await second.resume(handle.job_id, next_index=7)
            assert [token.index for token in await read(again)] == [7]


async def test_without_redis_a_job_is_resumed_by_its_origin(nats_url: str, bus: Bus, model: str) -> None:
    async with FakeWorker(bus, model):
        async with await TokenmillClient.connect(nats_url, model=model, origin="mine") as first:
            handle = await first.submit([1], length(8))
        async with await TokenmillClient.connect(nats_url, model=model) as second:
            assert [t.index for t in await read(await second.resume(handle.job_id, 5, origin="mine"))] == [5, 6, 7]


async def test_a_result_can_be_awaited_beside_a_reader_and_before_the_job_has_run(nats_url: str, redis_url: str, bus: Bus,
                                                                                  model: str) -> None:
    async with (await TokenmillClient.connect(nats_url, redis_url, model=model) as client,
                await TokenmillClient.connect(nats_url, redis_url, model=model) as another):
        handle = await client.submit([1], length(6))
        results = [asyncio.create_task(c.result(handle.job_id, timeout_s=20)) for c in (client, another)]
        async with FakeWorker(bus, model):
            assert_whole(await read(handle), handle.job_id, 6)
            assert [r.text for r in await asyncio.gather(*results)] == [answer(handle.job_id, 6)] * 2
        with pytest.raises(UnknownJob):
            await another.result("nobody-knows-it")
        waiting = await client.submit([1], length(6))
        with pytest.raises(Unavailable, match=r"is not over within 0\.2 s"):
            await client.result(waiting.job_id, timeout_s=0.2)
