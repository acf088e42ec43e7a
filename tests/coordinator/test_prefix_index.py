"""The index of cached prefixes on a real Redis: bounded, forgetful on purpose, never wrong about a living holder for long."""

from collections.abc import AsyncIterator

import pytest

from coordinator.prefix_blocks import block_digests
from coordinator.prefix_index import MOST_HOLDERS, PrefixIndex
from coordinator.store import Store

pytestmark = pytest.mark.services

TOKENS = list(range(100, 165))


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(redis_url)
    yield store
    await store.close()


async def era_of(index: PrefixIndex) -> str:
    return await index.tell(1, "", [], [])


def test_digests_name_full_pages_before_the_last_token_and_depend_on_all_before_them() -> None:
    digests = block_digests(TOKENS, 16, 100)
    assert len(digests) == 4 and len(set(digests)) == 4
    assert len(block_digests(TOKENS[:64], 16, 100)) == 3
    assert block_digests(TOKENS, 16, 2) == digests[:2]
    assert block_digests([0, *TOKENS[1:]], 16, 100)[1:] != digests[1:]


async def test_who_told_of_pages_is_found_with_as_many_as_it_holds(store: Store) -> None:
    index = PrefixIndex(store, "m")
    digests, era = block_digests(TOKENS, 16, 100), await era_of(index)
    assert await index.tell(1, era, digests, []) == era
    await index.tell(2, era, digests[:2], [])
    assert await index.look_up(digests) == {1: 4, 2: 2}
    await index.tell(1, era, [], digests[3:])
    assert await index.look_up(digests) == {1: 3, 2: 2}
    assert await PrefixIndex(store, "other").look_up(digests) == {}


async def test_after_redis_lost_its_data_all_is_wanted_again(store: Store, redis_url: str) -> None:
    index = PrefixIndex(store, "m")
    digests, era = block_digests(TOKENS, 16, 100), await era_of(index)
    await index.tell(1, era, digests, [])
    await store._redis.flushall()
    later = await index.tell(1, era, digests[:1], [])
    assert later != era
    assert await index.look_up(digests) == {}
    assert await index.tell(1, later, digests, []) == later


async def test_the_index_never_grows_over_its_bound_nor_the_list_of_one_pages_holders(store: Store) -> None:
    index = PrefixIndex(store, "m", most_blocks=10)
    digests, era = block_digests(list(range(500)), 16, 100), await era_of(index)
    await index.tell(1, era, digests, [])
    assert await store._redis.hlen("{tokenmill}:prefix:m") == 10
    for holder in range(2, 20):
        await index.tell(holder, era, digests[-1:], [])
    assert len(await index.look_up(digests[-1:])) == MOST_HOLDERS


async def test_holders_without_a_lease_are_swept_out(store: Store) -> None:
    index = PrefixIndex(store, "m")
    living, _ = await store.register("w", {"model": "m"})
    digests, era = block_digests(TOKENS, 16, 100), await era_of(index)
    await index.tell(living, era, digests, [])
    await index.tell(7, era, digests, [])
    await index.sweep()
    assert await index.look_up(digests) == {living: 4}
