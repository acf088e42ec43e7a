"""Chains on a real nats-server: compare-and-set appends, fences, what live readers see, and outages."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import pytest

from coordinator import subjects
from coordinator.bus import Bus, Chain, Message
from coordinator.connection import ApiError, Connection
from coordinator.embedded import EmbeddedServices
from coordinator.errors import Fenced, Unavailable
from coordinator.messages import Frame, TokenRun

pytestmark = pytest.mark.services

CHAIN = subjects.chain("o1", "w1", 1)
TOMBSTONE = Frame(tombstone="w2.1")


def a_frame(index: int, job_id: str = "j1") -> Frame:
    run = TokenRun(job_id=job_id, epoch=1, first_index=index, token_ids=(index,), logprobs=(0.0,), texts=("t",))
    return Frame(runs=(run,))


async def frames_of(bus: Bus, subject: str = CHAIN) -> list[Frame]:
    return [frame for _, _, frame in await bus.read_chain(subject)]


class LossyBroker:
    """Stands between a chain and its connection and drops acknowledgements: the frame is stored, the writer hears nothing."""

    def __init__(self, bus: Bus) -> None:
        self._bus, self._store = bus, bus.store
        self.num_dropped = 0
        self.should_drop: Callable[[], bool] = lambda: True

    async def store(self, subject: str, data: bytes, headers: dict[str, str], timeout_s: float = 2.0) -> int:
        seq = await self._store(subject, data, headers, timeout_s)
        if self.should_drop():
            self.num_dropped += 1
            raise Unavailable("the acknowledgement was lost")
        return seq


@pytest.fixture
def lossy(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> LossyBroker:
    broker = LossyBroker(bus)
    monkeypatch.setattr(bus, "store", broker.store)
    return broker


async def test_frames_stand_in_the_order_in_which_they_were_appended(bus: Bus) -> None:
    chain = Chain(bus, CHAIN)
    seqs = [await chain.append(a_frame(i).encode()) for i in range(20)]
    assert seqs == sorted(set(seqs))
    assert await bus.read_chain(CHAIN) == [(CHAIN, seq, a_frame(i)) for i, seq in enumerate(seqs)]


async def test_appends_that_are_called_at_once_go_one_after_another(bus: Bus) -> None:
    chain = Chain(bus, CHAIN)
    await asyncio.gather(*(chain.append(a_frame(i).encode()) for i in range(50)))
    assert await frames_of(bus) == [a_frame(i) for i in range(50)]


async def test_a_stale_writer_is_refused_and_stays_refused(bus: Bus) -> None:
    zombie = Chain(bus, CHAIN)
    await zombie.append(a_frame(0).encode())
    await bus.fence(CHAIN, "w2.1")
    for _ in range(2):
        with pytest.raises(Fenced, match=CHAIN):
            await zombie.append(a_frame(1).encode())
    assert zombie.is_fenced
    assert await frames_of(bus) == [a_frame(0), TOMBSTONE]


async def test_a_fence_works_on_a_chain_without_frames(bus: Bus) -> None:
    seq = await bus.fence(CHAIN, "w2.1")
    with pytest.raises(Fenced):
        await Chain(bus, CHAIN).append(a_frame(0).encode())
    assert await bus.read_chain(CHAIN) == [(CHAIN, seq, TOMBSTONE)]


async def test_a_second_fence_keeps_the_first_tombstone(bus: Bus) -> None:
    first = await bus.fence(CHAIN, "w2.1")
    assert await bus.fence(CHAIN, "w3.7") == first
    assert await frames_of(bus) == [TOMBSTONE]


async def test_of_concurrent_fences_one_tombstone_stands(bus: Bus) -> None:
    seqs = await asyncio.gather(*(bus.fence(CHAIN, f"w{i}.1") for i in range(8)))
    assert len(set(seqs)) == 1 and len(await frames_of(bus)) == 1


async def test_another_writers_frame_on_our_chain_fences_us(bus: Bus) -> None:
    ours, theirs = Chain(bus, CHAIN), Chain(bus, CHAIN)
    await theirs.append(a_frame(0).encode())
    with pytest.raises(Fenced):
        await ours.append(a_frame(9).encode())
    assert await frames_of(bus) == [a_frame(0)]


async def test_a_fence_ends_an_owner_that_appends_without_pause(bus: Bus, nats_url: str) -> None:
    async with await Bus.connect(nats_url, "owner") as owner:
        chain, appended = Chain(owner, CHAIN), 0
        started = asyncio.Event()

        async def append_for_ever() -> None:
            nonlocal appended
            while True:
                await chain.append(a_frame(appended).encode())
                appended += 1
                started.set()

        owning = asyncio.create_task(append_for_ever())
        await started.wait()
        await bus.fence(CHAIN, "w2.1")
        with pytest.raises(Fenced):
            await owning
    # What the owner was told is stored is what stands, and nothing came after the tombstone.
    assert await frames_of(bus) == [*(a_frame(i) for i in range(appended)), TOMBSTONE]


async def test_live_readers_see_what_is_stored_in_order_and_never_a_zombies_frame(bus: Bus, nats_url: str) -> None:
    seen: asyncio.Queue[tuple[str, int, Frame]] = asyncio.Queue()

    def note(message: Message) -> None:
        seen.put_nowait((message.headers["Nats-Subject"], int(message.headers["Nats-Sequence"]), Frame.decode(message.data)))

    async with await Bus.connect(nats_url, "reader") as reader:
        await reader.subscribe(subjects.live("o1"), note)
        await reader.flush()
        zombie, other, foreign = Chain(bus, CHAIN), Chain(bus, subjects.chain("o1", "w2", 1)), Chain(bus, subjects.chain("o2", "w1", 1))
        for i in range(30):
            await asyncio.gather(*(chain.append(a_frame(i).encode()) for chain in (zombie, other, foreign)))
        await bus.fence(CHAIN, "w2.1")
        with pytest.raises(Fenced):
            await zombie.append(a_frame(30).encode())
        await other.append(a_frame(30).encode())
        live = [await seen.get() for _ in range(62)]
        await reader.flush()
        assert live == await bus.read_chain("out.o1.>") and seen.empty()


async def test_a_frame_whose_acknowledgement_was_lost_is_not_stored_again(bus: Bus, lossy: LossyBroker) -> None:
    chain = Chain(bus, CHAIN)
    seqs = [await chain.append(a_frame(i).encode(), deadline_s=5.0) for i in range(5)]
    assert lossy.num_dropped == 5
    assert await bus.read_chain(CHAIN) == [(CHAIN, seq, a_frame(i)) for i, seq in enumerate(seqs)]


async def test_a_frame_that_was_given_up_but_stored_does_not_look_like_a_fence(bus: Bus, lossy: LossyBroker) -> None:
    chain = Chain(bus, CHAIN)
    with pytest.raises(Unavailable):
        await chain.append(a_frame(0).encode(), deadline_s=0.001)
    lossy.should_drop = lambda: False
    await chain.append(a_frame(1).encode())
    assert await frames_of(bus) == [a_frame(0), a_frame(1)]


async def test_a_cancelled_append_leaves_the_chain_usable(bus: Bus) -> None:
    chain = Chain(bus, CHAIN)
    for i in range(20):
        append = asyncio.create_task(chain.append(a_frame(i).encode()))
        for _ in range(i % 4):
            await asyncio.sleep(0)
        append.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await append
    await chain.append(a_frame(20).encode())
    stored = [frame.runs[0].first_index for frame in await frames_of(bus)]
    assert stored == sorted(set(stored)) and stored[-1] == 20


async def test_a_tombstone_is_seen_behind_a_lost_acknowledgement(bus: Bus, lossy: LossyBroker) -> None:
    """Our frame was stored, we were not told, and then the chain was fenced: we must stop, the frame stays shown."""
    chain = Chain(bus, CHAIN)
    with pytest.raises(Unavailable):
        await chain.append(a_frame(0).encode(), deadline_s=0.001)
    lossy.should_drop = lambda: False
    await bus.fence(CHAIN, "w2.1")
    with pytest.raises(Fenced):
        await chain.append(a_frame(0).encode())
    assert await frames_of(bus) == [a_frame(0), TOMBSTONE]


async def test_a_chain_whose_frames_aged_out_begins_again_but_not_over_a_tombstone(bus: Bus) -> None:
    chain = Chain(bus, CHAIN)
    await chain.append(a_frame(0).encode())
    await bus.api("STREAM.PURGE.OUT", {"filter": CHAIN})   # what max_age does, now
    await chain.append(a_frame(1).encode())
    assert await frames_of(bus) == [a_frame(1)]
    await bus.fence(CHAIN, "w2.1")
    await bus.api("STREAM.PURGE.OUT", {"filter": CHAIN, "keep": 1})
    with pytest.raises(Fenced):
        await chain.append(a_frame(2).encode())


async def test_appends_over_kills_of_the_broker_leave_no_gap_and_no_duplicate(own_services: EmbeddedServices) -> None:
    async with await Bus.connect(own_services.nats_url, "w1") as bus:
        await bus.provision("m")
        chains = [Chain(bus, subjects.chain("o1", f"w{i}", 1)) for i in range(8)]
        appended = [0] * len(chains)
        is_over, progress = False, asyncio.Event()

        async def append(number: int, chain: Chain) -> None:
            while not is_over:
                await chain.append(a_frame(appended[number]).encode())
                appended[number] += 1
                progress.set()

        async def reach(num_frames: int) -> None:
            while min(appended) < num_frames:
                progress.clear()
                await progress.wait()

        appending = asyncio.gather(*(append(number, chain) for number, chain in enumerate(chains)))
        for _ in range(3):
            await reach(min(appended) + 30)
            await asyncio.to_thread(own_services.restart_nats)
        await reach(min(appended) + 30)
        is_over = True
        await appending
        for number, chain in enumerate(chains):
            assert await frames_of(bus, chain.subject) == [a_frame(i) for i in range(appended[number])]


async def test_an_append_waits_out_an_outage_or_its_deadline(own_services: EmbeddedServices) -> None:
    async with await Bus.connect(own_services.nats_url, "w1") as bus:
        await bus.provision("m")
        patient, hasty = Chain(bus, CHAIN), Chain(bus, subjects.chain("o1", "w2", 1))
        own_services.nats.kill()
        waiting = asyncio.create_task(patient.append(a_frame(0).encode()))
        with pytest.raises(Unavailable, match=r"not done within 0\.2 s"):
            await hasty.append(a_frame(0).encode(), deadline_s=0.2)
        await asyncio.to_thread(own_services.nats.start)
        await waiting
        assert await frames_of(bus) == [a_frame(0)]
        own_services.nats.kill()
        waiting = asyncio.create_task(patient.append(a_frame(1).encode()))
        await asyncio.sleep(0)
        await bus.close()
        with pytest.raises(Unavailable, match="closed"):
            await waiting


async def test_a_read_goes_over_many_batches_and_subjects_from_any_start(bus: Bus) -> None:
    chains = [Chain(bus, subjects.chain("o1", f"w{i}", 1)) for i in range(4)]

    async def fill(chain: Chain) -> None:
        for i in range(300):
            await chain.append(a_frame(i, "j" * 100).encode())

    await asyncio.gather(*(fill(chain) for chain in chains))
    all_frames = await bus.read_chain("out.o1.>")
    assert len(all_frames) == 1200 and [seq for _, seq, _ in all_frames] == sorted({seq for _, seq, _ in all_frames})
    assert await bus.read_chain("out.o1.>", start_seq=all_frames[700][1]) == all_frames[700:]
    assert [frame.runs[0].first_index for _, _, frame in await bus.read_chain(chains[2].subject)] == list(range(300))
    assert await bus.read_chain("out.nobody.>") == []
    assert await bus.read_chain("out.o1.>", start_time_ms=time.time_ns() // 1_000_000 + 60_000) == []
    assert await bus.read_chain("out.o1.>", start_time_ms=time.time_ns() // 1_000_000 - 600_000) == all_frames


async def test_large_frames_are_read_whole(bus: Bus) -> None:
    run = TokenRun(job_id="j1", epoch=1, first_index=0, token_ids=(1,) * 50_000, logprobs=(0.0,) * 50_000, texts=("t" * 20,) * 50_000)
    chain = Chain(bus, CHAIN)
    for _ in range(4):
        await chain.append(Frame(runs=(run,)).encode())
    assert [frame.runs == (run,) for frame in await frames_of(bus)] == [True] * 4


async def test_malformed_frames_are_left_out_and_counted(bus: Bus) -> None:
    chain = Chain(bus, CHAIN)
    await chain.append(a_frame(0).encode())
    await chain.append(b"\xc1 no frame")
    await chain.append(a_frame(1).encode())
    assert await frames_of(bus) == [a_frame(0), a_frame(1)]
    assert bus.malformed_frames == 1
    await bus.fence(CHAIN, "w2.1")


async def test_a_read_that_is_cut_by_a_restart_goes_on_where_it_was(own_services: EmbeddedServices,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.jetstream.READ_BATCH", 10)
    async with await Bus.connect(own_services.nats_url, "w1") as bus:
        await bus.provision("m")
        chain = Chain(bus, CHAIN)
        for i in range(100):
            await chain.append(a_frame(i).encode())
        exchange, num_reads = Connection.exchange, 0

        async def exchange_with_restart(self: Connection, *arguments: object) -> object:
            nonlocal num_reads
            num_reads += 1
            if num_reads == 4:
                await asyncio.to_thread(own_services.restart_nats)
            return await exchange(self, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Connection, "exchange", exchange_with_restart)
        reading: Awaitable[list[Frame]] = frames_of(bus)
        assert await reading == [a_frame(i) for i in range(100)]
        assert num_reads >= 10


async def test_an_append_to_a_stream_that_is_gone_says_so(bus: Bus) -> None:
    await bus.api("STREAM.DELETE.OUT")
    with pytest.raises(Unavailable, match="nobody listens"):
        await Chain(bus, CHAIN).append(a_frame(0).encode(), deadline_s=0.1)
    with pytest.raises((Unavailable, ApiError)):
        await bus.fence(CHAIN, "w2.1", deadline_s=0.1)
