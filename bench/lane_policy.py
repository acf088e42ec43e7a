"""The farm's own policy in virtual time: coordinator/routing.py on views that are a second old, `any` as a queue with open pulls."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from bench.virtual_farm import VirtualClock, VirtualWorker
from coordinator.routing import RouteRequest, RoutingPolicy, Snapshot, WorkerLoad, choose_lane
from coordinator.subjects import WORKER_LANE, worker_lane
from producers.router import REFRESH_S, UNSEEN_S


class LanePolicy:
    """In `cache_aware`'s place. What it knows of caches is exact; what it knows of loads is as old as a router's view."""

    def __init__(self, clock: VirtualClock, policy: RoutingPolicy) -> None:
        self._clock = clock
        self._policy = policy
        self._loads: dict[str, WorkerLoad] = {}
        self._seen_s = float("-inf")
        self._sent: list[tuple[float, str, int]] = []
        self._turns = count()

    def __call__(self, workers: Sequence[VirtualWorker], prompt: Sequence[int]) -> VirtualWorker:
        now_s = self._clock.now_s
        if now_s - self._seen_s >= REFRESH_S:
            self._seen_s = now_s
            self._loads = {str(worker.index): WorkerLoad(
                worker=str(worker.index), lane=worker_lane(str(worker.index)), role="both", backlog=worker.take_standing(),
                num_jobs=worker.num_jobs) for worker in workers}
        cached = {str(worker.index): worker.cached_tokens(prompt) for worker in workers}
        lane = choose_lane(RouteRequest(num_tokens=len(prompt), cached=cached), self._snapshot(now_s), self._policy)
        if lane.startswith(WORKER_LANE):
            name = lane.removeprefix(WORKER_LANE)
            self._sent.append((now_s, name, len(prompt) - cached[name]))
            return workers[int(name)]
        return workers[next(self._turns) % len(workers)]      # the server serves open pulls in turn

    def _snapshot(self, now_s: float) -> Snapshot:
        self._sent = [sent for sent in self._sent if now_s - sent[0] <= UNSEEN_S]
        loads = dict(self._loads)
        for _, name, num_tokens in self._sent:
            loads[name] = replace(loads[name], backlog=loads[name].backlog + num_tokens, num_jobs=loads[name].num_jobs + 1)
        return Snapshot(workers=tuple(loads.values()))
