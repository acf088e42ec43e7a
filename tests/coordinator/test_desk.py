"""The desk: nobody starts before all are there, and one that leaves is known to all others at once. Real sockets."""

import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from coordinator import desk_record
from coordinator.desk import Desk
from coordinator.errors import ConfigError
from coordinator.rendezvous import CRASHED, DONE, VANISHED, Broken, Formed, Member, Seat, ask_services

TOKEN = "secret"


class Rank:
    """One member in a thread."""

    all: "list[Rank]" = []  # noqa: RUF012

    def __init__(self, desk: Desk, rank: int, size: int, facts: dict[str, str] | None = None, token: str = TOKEN) -> None:
        self.outcome: queue.Queue[Formed | Exception] = queue.Queue()
        self.broken: queue.Queue[Broken] = queue.Queue()
        self.member = Member.connect(desk.address, token)
        Rank.all.append(self)
        self._seat = Seat(group="all", rank=rank, size=size, facts=facts or {}, endpoints={"at": f"rank-{rank}"})
        threading.Thread(target=self._join, daemon=True).start()

    def _join(self) -> None:
        try:
            formed = self.member.join(self._seat)
        except Exception as error:
            self.outcome.put(error)
            return
        self.member.watch(self.broken.put)
        self.outcome.put(formed)

    def formed(self) -> Formed:
        outcome = self.outcome.get(timeout=20)
        assert isinstance(outcome, Formed), outcome
        return outcome

    def refusal(self) -> str:
        outcome = self.outcome.get(timeout=20)
        assert isinstance(outcome, ConfigError), outcome
        return str(outcome)



@pytest.fixture(autouse=True)
def no_socket_stays() -> Iterator[None]:
    yield
    while Rank.all:
        Rank.all.pop().member.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    with Desk("127.0.0.1", 0, TOKEN, services={"nats_url": "nats://n", "redis_url": "redis://r"}, facts={"--tp": "4"}) as started:
        yield started


def test_a_group_forms_when_the_last_rank_is_there_and_all_learn_where_all_are(desk: Desk) -> None:
    first, second = Rank(desk, 1, 3), Rank(desk, 0, 3)
    with pytest.raises(queue.Empty):
        first.outcome.get(timeout=0.2)
    formed = [rank.formed() for rank in (first, second, Rank(desk, 2, 3))]
    assert len({f.generation for f in formed}) == 1
    assert formed[0].endpoints == tuple({"at": f"rank-{rank}"} for rank in range(3))


@pytest.mark.parametrize(("how", "why"), [("vanish", VANISHED), (DONE, DONE), (CRASHED, CRASHED)])
def test_all_others_are_told_when_one_leaves_and_the_next_group_is_another_generation(desk: Desk, how: str, why: str) -> None:
    ranks = [Rank(desk, rank, 3) for rank in range(3)]
    generation = max([rank.formed().generation for rank in ranks])
    ranks[1].member.close() if how == "vanish" else ranks[1].member.leave(how, "out of luck")
    for other in (ranks[0], ranks[2]):
        broken = other.broken.get(timeout=20)
        assert (broken.rank, broken.why) == (1, why)
    again = [Rank(desk, rank, 3) for rank in range(3)]
    assert {rank.formed().generation > generation for rank in again} == {True}


def test_a_rank_that_comes_back_before_its_death_was_seen_breaks_the_old_group(desk: Desk) -> None:
    old = [Rank(desk, rank, 2) for rank in range(2)]
    generation = max([rank.formed().generation for rank in old])
    young = Rank(desk, 1, 2)
    assert old[0].broken.get(timeout=20).rank == 1
    other = Rank(desk, 0, 2)
    assert young.formed().generation == other.formed().generation > generation


def test_ranks_with_other_settings_or_another_token_are_refused_by_name_and_the_rest_is_unharmed(desk: Desk) -> None:
    first = Rank(desk, 0, 2, {"--page_size": "16"})
    while not desk._groups:  # until it is seated
        time.sleep(0.005)
    assert "--page_size is 64 here and 16 for rank 0" in Rank(desk, 1, 2, {"--page_size": "64"}).refusal()
    assert "TOKENMILL_CLUSTER_TOKEN" in Rank(desk, 1, 2, {"--page_size": "16"}, token="wrong").refusal()
    assert "rank 5 of 9" in Rank(desk, 5, 9, {"--page_size": "16"}).refusal()
    second = Rank(desk, 1, 2, {"--page_size": "16"})
    assert first.formed() == second.formed()


def test_other_nodes_learn_where_the_queue_is_and_flags_that_differ_are_named(desk: Desk) -> None:
    found = ask_services(lambda: desk.address, TOKEN, node_rank=1, facts={"--tp": "4"})
    assert found == (desk.address, {"nats_url": "nats://n", "redis_url": "redis://r"})
    with pytest.raises(ConfigError, match="--tp is 8 here and 4 for node 0"):
        ask_services(lambda: desk.address, TOKEN, node_rank=1, facts={"--tp": "8"})


def test_the_end_of_the_desk_breaks_its_groups() -> None:
    with Desk("127.0.0.1", 0, TOKEN) as desk:
        ranks = [Rank(desk, rank, 2) for rank in range(2)]
        assert [rank.formed() for rank in ranks]
    assert [rank.broken.get(timeout=20).why for rank in ranks] == [VANISHED] * 2


def test_a_desk_whose_address_is_taken_says_so() -> None:
    with Desk("127.0.0.1", 0, TOKEN) as desk, pytest.raises(ConfigError, match="--nccl_port"):
        Desk("127.0.0.1", int(desk.address.rpartition(":")[2]), TOKEN).start()


def test_garbage_on_the_port_harms_nobody(desk: Desk) -> None:
    with socket.create_connection(("127.0.0.1", int(desk.address.rpartition(":")[2]))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(10) == b""
    assert Rank(desk, 0, 1).formed()


def test_whoever_connects_and_says_nothing_is_not_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.desk.SILENCE_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(desk.address.rpartition(":")[2])), timeout=20) as stranger:
        assert stranger.recv(10) == b""


def test_a_rank_of_another_size_is_refused_and_the_group_goes_on(desk: Desk) -> None:
    ranks = [Rank(desk, rank, 2) for rank in range(2)]
    assert [rank.formed() for rank in ranks]
    assert "rank 5 of 9" in Rank(desk, 5, 9).refusal()
    with pytest.raises(queue.Empty):
        ranks[0].broken.get(timeout=0.2)


@pytest.mark.services
def test_nodes_that_know_the_farms_redis_find_the_desk_through_it(redis_url: str, desk: Desk) -> None:
    addresses = iter(["", "127.0.0.1:9"])  # not written down yet; what a dead node 0 left
    desk_record.tell(redis_url, "g", "127.0.0.1:9")
    desk_record.tell(redis_url, "g", desk.address)
    found, urls = ask_services(lambda: next(addresses, desk_record.find(redis_url, "g")), TOKEN, node_rank=1, facts={"--tp": "4"})
    assert found == desk.address and urls["nats_url"] == "nats://n"
    with pytest.raises(ConfigError, match=r"another group called g.*--worker_id"):
        desk_record.tell(redis_url, "g", "127.0.0.1:1")
    assert desk_record.own_address(redis_url) == "127.0.0.1"
