"""Find the lane for a job: what Redis knows of caches and workers, put to the policy of coordinator/routing.py.

Workers are looked at once a second, beside the jobs; a job itself costs one look-up of its prompt's pages, and none where nobody has a
lane of its own. Where Redis is slow or away, jobs go to `any`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.errors import Unavailable
from coordinator.prefix_blocks import block_digests
from coordinator.prefix_index import PrefixIndex
from coordinator.routing import RouteRequest, RoutingPolicy, Snapshot, WorkerLoad, choose_lane
from coordinator.store import Store, WorkerView
from coordinator.subjects import ANY_LANE, LOCAL_LANE, WORKER_LANE
from coordinator.tasks import end

log = logging.getLogger(__name__)

REFRESH_S = 1.0
UNSEEN_S = 0.5           # what was sent to a worker's lane so recently is taken to wait there still
LOOK_UP_S = 0.05         # longer than this a job does not wait for the index
MOST_BLOCKS = 512        # of one prompt that are looked up


@dataclass(frozen=True, slots=True)
class _Sent:
    at_s: float
    worker: str
    num_tokens: int


class Router:
    """One per producer, if its policy needs one. `start` before the first `lane`."""

    def __init__(self, store: Store, model: str, policy: RoutingPolicy) -> None:
        self._store = store
        self._model = model
        self._policy = policy
        self._index = PrefixIndex(store, model)
        self._loads: dict[str, WorkerLoad] = {}       # by worker
        self._worker_of: dict[int, str] = {}          # incarnation number -> worker
        self._page_size = 0
        self._sent: deque[_Sent] = deque()
        self._task: asyncio.Task[None] | None = None
        self.num_by_lane = {"any": 0, "local": 0, "worker": 0}
        self.num_slow = 0

    async def start(self) -> None:
        await self._refresh()
        self._task = asyncio.create_task(self._refresh_forever(), name="router")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    async def lane(self, prompt_ids: Sequence[int]) -> str:
        """A lane's name; "" for the one that a job without a reason takes."""
        lane = ANY_LANE
        if self._loads:
            cached = await self._cached(prompt_ids) if self._policy.prefix_affinity else {}
            if cached or len(prompt_ids) < self._policy.disagg_min_tokens:
                lane = choose_lane(RouteRequest(num_tokens=len(prompt_ids), cached=cached), self._snapshot(), self._policy)
                if lane.startswith(WORKER_LANE):
                    worker = lane.removeprefix(WORKER_LANE)
                    self._sent.append(_Sent(time.monotonic(), worker, len(prompt_ids) - cached.get(worker, 0)))
        self.num_by_lane["worker" if lane.startswith(WORKER_LANE) else lane] += 1
        return "" if lane == ANY_LANE else lane

    async def _cached(self, prompt_ids: Sequence[int]) -> dict[str, int]:
        if not self._page_size:
            return {}
        digests = block_digests(prompt_ids, self._page_size, MOST_BLOCKS)
        try:
            async with asyncio.timeout(LOOK_UP_S):
                depths = await self._index.look_up(digests)
        except (Unavailable, TimeoutError):
            self.num_slow += 1
            return {}
        return {worker: depth * self._page_size for holder, depth in depths.items()
                if (worker := self._worker_of.get(holder)) is not None}

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            views = [view for view in await self._store.workers(self._model) if view.is_serving]
        except Unavailable as error:
            log.info("routing by what was known: %s", error)
            return
        loads = [load for view in views if (load := _load(view)) is not None]
        self._loads = {load.worker: load for load in loads}
        self._worker_of = {view.incarnation: view.worker for view in views}
        self._page_size = next((int(view.info["layout"]["page_size"]) for view in views if view.info.get("lanes")), 0)
        if len(loads) < 2 or not any(load.lane or load.role == "decode" for load in loads):
            self._loads = {}     # nobody to prefer to somebody else: no job is looked up

    def _snapshot(self) -> Snapshot:
        """What workers said of themselves, and what was sent to them just now."""
        while self._sent and time.monotonic() - self._sent[0].at_s > UNSEEN_S:
            self._sent.popleft()
        loads = dict(self._loads) if self._sent else self._loads
        for sent in self._sent:
            if (load := loads.get(sent.worker)) is not None:
                loads[sent.worker] = replace(load, backlog=load.backlog + sent.num_tokens, num_jobs=load.num_jobs + 1)
        return Snapshot(workers=tuple(loads.values()))


def _load(view: WorkerView) -> WorkerLoad | None:
    """None for a decode worker that takes no prompts."""
    lanes = view.info.get("lanes", ())
    if view.role == "decode" and LOCAL_LANE not in lanes:
        return None
    return WorkerLoad(worker=view.worker, lane=next((lane for lane in lanes if lane.startswith(WORKER_LANE)), ""), role=view.role,
                      backlog=int(view.info.get("standing_tokens", 0)), num_jobs=view.num_owned,
                      has_room=view.num_owned < int(view.info.get("max_num_seqs", 1)) and int(view.stats.get("free_tokens", 1)) > 0)
