"""The router on a real Redis: to whom it may send, by what workers say of themselves."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator.prefix_blocks import block_digests
from coordinator.prefix_index import PrefixIndex
from coordinator.routing import RoutingPolicy
from coordinator.store import Store, owner_name
from producers.router import Router

pytestmark = pytest.mark.services

PROMPT = list(range(200))


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(redis_url)
    yield store
    await store.close()


def info(worker: str, state: str = "serving") -> dict[str, Any]:
    return {"role": "both", "model": "m", "lanes": [f"w-{worker}"], "state": state, "max_num_seqs": 8, "layout": {"page_size": 16}}


async def test_a_worker_that_is_draining_gets_no_jobs_by_its_lane(store: Store) -> None:
    number = {worker: (await store.register(worker, info(worker)))[0] for worker in ("a", "b", "c")}
    index = PrefixIndex(store, "m")
    era = await index.tell(number["a"], "", [], [])
    await index.tell(number["a"], era, block_digests(PROMPT, 16, 100), [])
    for state, lane in (("serving", "w-a"), ("draining", "")):
        await store.renew(owner_name("a", number["a"]), info("a", state))
        router = Router(store, "m", RoutingPolicy(prefix_affinity=True))
        await router.start()
        assert await router.lane(PROMPT) == lane
        await router.close()
