"""What every way of transfer keeps to: values, layouts, and what happens when the other side dies, hangs or writes anew."""

import contextlib
import errno
import itertools
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coordinator.errors import LayoutMismatch, Unavailable
from tests.workers.transfer.pools import KINDS, PAGE_SIZE, cells, make_pool, num_open_files, read
from tests.workers.transfer.transports import SILENCE_S, Source, fetch, open_link
from workers.kv_cache import HeadRun, KVCache
from workers.transfer.collective import CollectiveLink
from workers.transfer.desk import Desk
from workers.transfer.mapped import MappedLink
from workers.transfer.moves import Move

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TRANSPORTS = [("loopback", "cpu"), ("mapped", "cpu"), ("collective", "cpu"), pytest.param(("mapped", "cuda"), marks=GPU),
              pytest.param(("collective", "cuda"), marks=GPU)]
REMOTE = TRANSPORTS[1:]
NUM_PAGES, BIG_PAGES, BIG_WIDTH = 40, 600, 2048     # the big one: 59 MB of latents, four chunks
ONE_HEAD = HeadRun(0, 0, 1)


class Sources:
    """Started once per kind and device; one that a test killed is started anew for the next."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, str, int], Source] = {}

    def get(self, kind: str, device: str, width: int = 16) -> Source:
        source = self._running.get((kind, device, width))
        if source is None or source.process.poll() is not None:
            if source is not None:
                source.close()
            num_pages = NUM_PAGES if width == 16 else BIG_PAGES
            source = self._running[kind, device, width] = Source(kind, num_pages, device=device, width=width).wait_ready()
        return source

    def close(self) -> None:
        for source in self._running.values():
            source.close()


@pytest.fixture(scope="module")
def sources() -> Iterator[Sources]:
    sources = Sources()
    yield sources
    sources.close()


@pytest.fixture(params=TRANSPORTS, ids="-".join)
def transport(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


remote = pytest.mark.parametrize("transport", REMOTE, ids="-".join)


def empty_pool(kind: str, device: str, width: int = 16, num_pages: int = NUM_PAGES) -> KVCache:
    return make_pool(kind, num_pages, device=device, width=width, is_filled=False)


def run_random_sets(family: str, device: str, sources: Sources, num_sets: int) -> None:
    for kind in KINDS:
        rng = random.Random(kind)
        pool, source = empty_pool(kind, device), sources.get(kind, device)
        source.fill(0)
        link = open_link(family, pool, source)
        expected = torch.zeros_like(read(pool, list(range(NUM_PAGES))))
        for i in range(num_sets // len(KINDS)):
            count = rng.randint(1, NUM_PAGES)
            first = rng.randrange(NUM_PAGES - count + 1)
            src_pages = list(range(first, first + count)) if rng.random() < 0.3 else rng.sample(range(NUM_PAGES), count)
            dst_pages = rng.sample(range(NUM_PAGES), count)
            num_tokens = count * PAGE_SIZE - rng.randrange(PAGE_SIZE)
            before = expected.clone()
            fetch([link], pool, src_pages, dst_pages, num_tokens)
            by_page = expected.unflatten(1, (-1, PAGE_SIZE))
            by_page[:, dst_pages] = cells(kind, src_pages, 1, 0, pool.head_width).unflatten(1, (-1, PAGE_SIZE))
            got = read(pool, list(range(NUM_PAGES)))
            unsaid = torch.zeros(expected.shape[1], dtype=torch.bool)  # behind the last token a page may hold anything
            unsaid[[dst_pages[-1] * PAGE_SIZE + i for i in range((num_tokens - 1) % PAGE_SIZE + 1, PAGE_SIZE)]] = True
            assert torch.equal(got[:, ~unsaid], expected[:, ~unsaid]), (kind, i, before.shape)
            expected = got
        link.close()


def test_random_page_sets_arrive_as_they_are_and_touch_nothing_else(transport: tuple[str, str], sources: Sources) -> None:
    run_random_sets(*transport, sources, num_sets=300)


@pytest.mark.chaos
def test_ten_thousand_random_page_sets(transport: tuple[str, str], sources: Sources) -> None:
    run_random_sets(*transport, sources, num_sets=10_000)


@remote
def test_pages_that_were_written_anew_arrive_anew(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("mla", device), sources.get("mla", device)
    link = open_link(family, pool, source)
    for salt in (1, 2, 3):
        source.fill(salt)
        fetch([link], pool, [5, 6], [1, 2], 8)
        assert torch.equal(read(pool, [1, 2]), cells("mla", [5, 6], 1, 0, 16, salt))
    link.close()


@remote
def test_a_source_that_died_before_is_unavailable(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("mla", device), sources.get("mla", device)
    source.kill()
    with pytest.raises(Unavailable):
        open_link(family, pool, source).copy(Move(src_pages=[0], dst_pages=[1], num_tokens=4, heads=ONE_HEAD))
    assert not read(pool, [1]).any()


@remote
def test_a_source_that_dies_in_mid_copy_ends_it_at_once_and_what_is_mapped_is_read_to_the_end(
        transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("mla", device, BIG_WIDTH, BIG_PAGES), sources.get("mla", device, BIG_WIDTH)
    link = open_link(family, pool, source)
    fetch([link], pool, [0], [0], 4)
    pages = list(range(BIG_PAGES))
    if family == "collective":
        source.signal(signal.SIGSTOP)  # asked, and not answered: in mid-transfer for sure
    killer = threading.Timer(0.3 if family == "collective" else 0.0, source.kill)
    started_at = time.monotonic()
    killer.start()
    try:
        fetch([link], pool, pages, pages, BIG_PAGES * PAGE_SIZE)
    except Unavailable:
        assert time.monotonic() - started_at < SILENCE_S
    else:
        assert torch.equal(read(pool, pages), cells("mla", pages, 1, 0, BIG_WIDTH)) and family == "mapped"
    killer.join()
    link.close()


def test_a_source_that_is_killed_while_it_sends_leaves_no_hanging_reader(sources: Sources) -> None:
    pages = list(range(BIG_PAGES))
    for delay_s in (0.0, 0.02):
        pool, source = empty_pool("mla", "cpu", BIG_WIDTH, BIG_PAGES), sources.get("mla", "cpu", BIG_WIDTH)
        link = open_link("collective", pool, source)
        killer = threading.Timer(delay_s, source.kill)
        started_at = time.monotonic()
        killer.start()
        with contextlib.suppress(Unavailable):  # a quick machine may be done before
            fetch([link], pool, pages, pages, BIG_PAGES * PAGE_SIZE)
            assert torch.equal(read(pool, pages), cells("mla", pages, 1, 0, BIG_WIDTH))
        assert time.monotonic() - started_at < 3 * SILENCE_S
        killer.join()
        link.close()


@remote
def test_what_arrived_stays_when_the_source_dies_after(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("gqa", device), sources.get("gqa", device)
    source.fill(0)
    link = open_link(family, pool, source)
    fetch([link], pool, [3, 9], [8, 1], 8)
    source.kill()
    assert torch.equal(read(pool, [8, 1]), cells("gqa", [3, 9], 1, 0, 16))
    with pytest.raises(Unavailable):
        fetch([link], pool, [3], [2], 4)
    link.close()


@remote
def test_a_source_that_hangs_costs_the_timeout_and_serves_again_when_it_is_back(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("mla", device), sources.get("mla", device)
    source.fill(0)
    link = open_link(family, pool, source)
    fetch([link], pool, [0], [0], 4)
    source.signal(signal.SIGSTOP)
    started_at = time.monotonic()
    try:
        fetch([link], pool, [1], [1], 4)
        assert family == "mapped"  # nobody is needed at the other end
    except Unavailable:
        assert SILENCE_S * 0.9 < time.monotonic() - started_at < SILENCE_S + 10
    source.signal(signal.SIGCONT)
    link.close()
    link = open_link(family, pool, source)
    fetch([link], pool, [7], [3], 4)
    assert torch.equal(read(pool, [3]), cells("mla", [7], 1, 0, 16))
    link.close()


@remote
def test_a_target_that_goes_away_in_mid_transfer_harms_no_other(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    source = sources.get("mla", device, BIG_WIDTH)
    pool, other = (empty_pool("mla", device, BIG_WIDTH, BIG_PAGES) for _ in range(2))
    leaving, staying = open_link(family, pool, source), open_link(family, other, source)
    if isinstance(leaving, CollectiveLink):
        leaving._control.send(pages=list(range(BIG_PAGES)), head=0, num_heads=1, chunk_pages=10)
        assert leaving._control.receive(10.0) == {"ok": True}
    leaving.close()
    fetch([staying], other, [1, 5], [2, 3], 8)
    assert torch.equal(read(other, [2, 3]), cells("mla", [1, 5], 1, 0, BIG_WIDTH))
    staying.close()


@remote
def test_pages_and_heads_that_do_not_exist_are_refused(transport: tuple[str, str], sources: Sources) -> None:
    family, device = transport
    pool, source = empty_pool("gqa", device), sources.get("gqa", device)
    for src, dst, heads in (([NUM_PAGES], [0], HeadRun(0, 0, 8)), ([0], [NUM_PAGES], HeadRun(0, 0, 8)), ([0], [0], HeadRun(1, 0, 8))):
        with contextlib.closing(open_link(family, pool, source)) as link, pytest.raises((ValueError, Unavailable), match=r"page|head"):
            link.copy(Move(src_pages=src, dst_pages=dst, num_tokens=4, heads=heads))


def test_a_pool_of_another_layout_is_refused(sources: Sources) -> None:
    source = sources.get("mla", "cpu")
    other = make_pool("mla", 4, dtype=torch.float16)
    with pytest.raises(LayoutMismatch, match="dtype"):
        MappedLink(other, source.ranks[0].address, NUM_PAGES, make_pool("mla", 1).layout("")).copy(
            Move(src_pages=[0], dst_pages=[0], num_tokens=4, heads=ONE_HEAD))


@pytest.mark.parametrize("desk", ["127.0.0.1:1:token", "nowhere", "127.0.0.1:x:token"])
def test_a_desk_that_is_not_there_is_unavailable(desk: str) -> None:
    with pytest.raises(Unavailable, match="KV desk"):
        CollectiveLink(make_pool("mla", 1), desk)


def test_a_stranger_without_the_token_gets_nothing(sources: Sources) -> None:
    host, port, _ = sources.get("mla", "cpu").ranks[0].desk.rsplit(":", 2)
    with pytest.raises(Unavailable, match="wrong token"):
        CollectiveLink(make_pool("mla", 1), f"{host}:{port}:guess")


def test_a_desk_without_a_descriptor_to_spare_answers_when_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, calls = socket.socket.accept, itertools.count()

    def failing_once(listener: socket.socket) -> tuple[socket.socket, Any]:
        if next(calls) == 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    pool = make_pool("mla", 1)
    with contextlib.closing(Desk(pool, "127.0.0.1")) as desk:
        monkeypatch.setattr(socket.socket, "accept", failing_once)
        address = desk.address.rpartition(":")[0]
        for _ in range(2):  # the first comes while the desk waits for it, the second behind the failure
            with pytest.raises(Unavailable, match="wrong token"):
                CollectiveLink(pool, f"{address}:guess", silence_s=5.0)


def test_closed_links_leave_no_descriptors(sources: Sources) -> None:
    source = sources.get("mla", "cpu")
    pool = empty_pool("mla", "cpu")
    counts = []
    for _ in range(4):
        link = open_link("collective", pool, source)
        fetch([link], pool, [0], [0], 4)
        link.close()
        counts.append(num_open_files())
    assert counts[-1] <= counts[0] + 1


@pytest.mark.parametrize(("source_tp", "target_tp"), [(2, 4), (4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_any_size_hand_over_to_groups_of_any_other(kind: str, source_tp: int, target_tp: int) -> None:
    with contextlib.closing(Source(kind, NUM_PAGES, source_tp).wait_ready()) as source:
        for family, rank in itertools.product(["mapped", "collective"], range(target_tp)):
            pool = make_pool(kind, NUM_PAGES, target_tp, rank, is_filled=False)
            links = [open_link(family, pool, source, i) for i in range(source_tp)]
            src_pages, dst_pages = (random.Random(seed).sample(range(NUM_PAGES), 11) for seed in (rank, rank + 9))
            fetch(links, pool, src_pages, dst_pages, 11 * PAGE_SIZE, rank)
            assert torch.equal(read(pool, dst_pages), cells(kind, src_pages, target_tp, rank, 16))
            for link in links:
                link.close()
