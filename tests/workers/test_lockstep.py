"""dp groups that step together: everybody runs every round, nobody runs when nobody has work, and whoever gets work wakes all."""

import queue
import random
import socket
import threading

import pytest

from coordinator.errors import MalformedMessage
from workers import lockstep
from workers.batch import Agreed, ForwardBatch
from workers.lockstep import Conductor, Go, Lockstep, Report, Wake, decode, encode
from workers.step_messages import Copy, encode_step
from workers.step_messages import decode as decode_step
from workers.step_messages import encode as encode_message


class Leader(threading.Thread):
    """Runs `work` (token counts; a command for each arrives when it may) and then ends, as an engine's loop does."""

    def __init__(self, dp_rank: int, conductor: list[Conductor]) -> None:
        super().__init__(daemon=True)
        self.lockstep = Lockstep(lambda report: conductor[0].report(dp_rank, report))
        self.inbox: queue.SimpleQueue[int | Wake | None] = queue.SimpleQueue()
        self.lockstep.on_wake = self.inbox.put
        self.ran: list[Agreed] = []
        self.num_tokens_run = 0
        self.num_loops = 0

    def run(self) -> None:
        waiting: list[int] = []
        is_leaving, is_idle = False, True
        while not (is_leaving and self.lockstep.are_all_leaving):
            self.num_loops += 1
            while is_idle or not self.inbox.empty():
                is_idle = False
                match self.inbox.get():
                    case None:
                        is_leaving = True
                    case Wake() as wake:
                        self.lockstep.wake(wake)
                    case int(count):
                        waiting.append(count)
            count = waiting.pop(0) if waiting else 0
            agreed = self.lockstep.turn(count, is_only_decodes=count <= 1, is_leaving=is_leaving)
            if agreed is None:
                assert not count
                is_idle = True
                continue
            assert agreed.num_rows >= count
            self.ran.append(agreed)
            self.num_tokens_run += count


def leaders(count: int) -> list[Leader]:
    conductor: list[Conductor] = []
    started = [Leader(rank, conductor) for rank in range(count)]
    conductor.append(Conductor([leader.lockstep.hear for leader in started]))
    for leader in started:
        leader.start()
    return started


@pytest.mark.parametrize("seed", range(4))
def test_whenever_work_comes_all_run_the_same_rounds_and_all_of_it_is_done(seed: int) -> None:
    draw = random.Random(seed)
    group = leaders(3)
    given = [0, 0, 0]
    for _ in range(200):
        rank, count = draw.randrange(3), draw.randrange(1, 50)
        group[rank].inbox.put(count)
        given[rank] += count
        if draw.random() < 0.1:
            threading.Event().wait(0.002)
    while [leader.num_tokens_run for leader in group] != given:
        threading.Event().wait(0.005)
    for leader in group:
        leader.inbox.put(None)
    for leader in group:
        leader.join(60)
        assert not leader.is_alive()
    assert group[0].ran == group[1].ran == group[2].ran


def test_without_work_everybody_sleeps() -> None:
    group = leaders(3)
    group[1].inbox.put(7)
    while not all(leader.ran for leader in group):
        threading.Event().wait(0.005)
    threading.Event().wait(0.05)
    loops = [leader.num_loops for leader in group]
    threading.Event().wait(0.2)
    assert [leader.num_loops for leader in group] == loops
    assert [len(leader.ran) for leader in group] == [1, 1, 1]
    assert group[0].ran == [Agreed(7, False)]


@pytest.mark.parametrize("message", [Report(3, 17, True, False), Go(3, (17, 0), False, True), Wake(9)])
def test_messages_of_the_lockstep_survive_the_wire(message: Report | Go | Wake) -> None:
    assert decode(encode(message)) == message


def test_a_step_arrives_as_it_was_sent_with_positions_and_slots_made_anew() -> None:
    batch = ForwardBatch(token_ids=[5, 6, 7, 0], positions=[3, 4, 5, 9], slot_mapping=[4 * 7 + 3, 4 * 2, 4 * 2 + 1, 4 * 3 + 1],
                         query_lens=[3, 1], seq_lens=[6, 10], page_tables=[[7, 2, 9], [1, 8, 3]], logit_rows=[2, 3], carried=[-1, 0],
                         agreed=Agreed(12, False))
    arrived = decode_step(encode_step(batch, 4), 4)
    batch.page_tables[0] = [7, 2]  # what it has beyond its tokens does not travel
    assert arrived == batch


def test_page_copies_arrive_as_they_were_sent() -> None:
    copy = Copy(copy_id=3, ranks=[("a", ""), ("b", "d")],
                num_pages=9, layout={"model": "m"}, src_pages=[1, 2], dst_pages=[3, 4], num_tokens=20)
    arrived = decode_step(encode_message(copy))
    assert isinstance(arrived, Copy) and list(arrived.src_pages) == [1, 2] and list(arrived.ranks) == [("a", ""), ("b", "d")]


def test_strangers_on_the_conductors_port_keep_no_leader_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "GREETING_S", 0.2)

    def check(hello: bytes) -> int:
        if hello != b"leader":
            raise MalformedMessage("no leader of this group")
        return 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        conducting: queue.SimpleQueue[Lockstep] = queue.SimpleQueue()
        threading.Thread(target=lambda: conducting.put(lockstep.conduct(listener, 2, check)), daemon=True).start()
        with socket.create_connection(address), socket.create_connection(address) as talker:  # one that says nothing
            talker.sendall(b"GET / HTTP/1.1\r\n\r\n")
            other = lockstep.keep_step(address, b"leader")
            first = conducting.get(timeout=20)
        woken: queue.SimpleQueue[Wake] = queue.SimpleQueue()
        other.on_wake = woken.put
        ran: queue.SimpleQueue[Agreed | None] = queue.SimpleQueue()
        threading.Thread(target=lambda: ran.put(first.turn(3, is_only_decodes=False)), daemon=True).start()
        other.wake(woken.get(timeout=20))
        assert other.turn(0, is_only_decodes=True) == ran.get(timeout=20) == Agreed(3, False)
