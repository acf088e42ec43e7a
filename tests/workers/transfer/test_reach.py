"""Which ways lead to a handle's pages: by host, by what the source offers, and by what this worker was told to use."""

import pytest

from coordinator.errors import Unreachable
from coordinator.host_identity import address_towards, host_identity
from coordinator.messages import KVRank, KVSource
from workers.transfer.reach import AUTO, COLLECTIVE, MAPPED, ways_to

BOTH, MEMORY, DESK = KVRank(address="/proc/1/fd/3", desk="h:1:t"), KVRank(address="/proc/1/fd/3"), KVRank(desk="h:1:t")


def source(*ranks: KVRank) -> KVSource:
    return KVSource(worker="p-0", incarnation=1, host="here", ranks=ranks, num_pages=4)


@pytest.mark.parametrize(("host", "mode", "offered", "ways"), [
    ("here", AUTO, BOTH, BOTH), ("here", AUTO, MEMORY, MEMORY), ("here", AUTO, DESK, DESK), ("there", AUTO, BOTH, DESK),
    ("here", MAPPED, BOTH, MEMORY), ("here", COLLECTIVE, BOTH, DESK), ("there", COLLECTIVE, BOTH, DESK),
])
def test_ways_that_lead_from_here_are_kept(host: str, mode: str, offered: KVRank, ways: KVRank) -> None:
    assert ways_to(source(offered, offered), host, mode) == (ways, ways)


@pytest.mark.parametrize(("host", "mode", "offered", "why"), [
    ("there", AUTO, MEMORY, "on another host, and it keeps no desk: start it with --kv_transfer auto"),
    ("there", MAPPED, BOTH, "on another host, and this worker has --kv_transfer mapped"),
    ("here", MAPPED, DESK, "cannot be mapped, and this worker has --kv_transfer mapped"),
    ("here", COLLECTIVE, MEMORY, "this worker has --kv_transfer collective, and it keeps no desk"),
    ("here", AUTO, KVRank(), "cannot be mapped, and it keeps no desk"),
])
def test_what_no_way_leads_to_is_refused_with_what_to_change(host: str, mode: str, offered: KVRank, why: str) -> None:
    with pytest.raises(Unreachable, match="KV pages of p-0 cannot be fetched") as refused:
        ways_to(source(BOTH, offered), host, mode)
    assert why in str(refused.value)


def test_a_host_is_itself_and_is_reached_from_itself_by_loopback() -> None:
    assert host_identity() == host_identity() and host_identity()
    assert address_towards("127.0.0.1", 4222) == "127.0.0.1"
    assert address_towards("no.such.host.invalid", 4222) == ""
