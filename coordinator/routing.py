"""Which lane a job is published to: (request, snapshot, policy) -> lane. Pure; knows no queue, no Redis and no clock.

`any` is the rule: whoever has room pulls next, so load spreads by itself. Two reasons to say more:

    affinity       a worker has most of the prompt in its prefix cache, and what that saves is more than what waits there beyond elsewhere
    short prompts  with prefill and decode apart: what is left to compute is so little that a decode worker does it in passing, and no
                   pages need to move

All is counted in prompt tokens to compute, the one currency that saving and waiting share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from coordinator.subjects import ANY_LANE, LOCAL_LANE


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """`prefix_affinity` False and `disagg_min_tokens` 0 turn the two off.

    min_saving      tokens that an own lane must save beyond what waits there
    max_load        no lane to a worker that would then have more than so many times the mean number of jobs,
    slack           and so many more: on a quiet farm one job is much more than the mean
    """

    prefix_affinity: bool = False
    disagg_min_tokens: int = 0
    min_saving: int = 32
    max_load: float = 1.25
    slack: int = 2

    @property
    def is_needed(self) -> bool:
        return self.prefix_affinity or self.disagg_min_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """A living worker as a router sees it. `backlog` counts prompt tokens that wait there, `num_jobs` what it has, waiting or running."""

    worker: str
    lane: str                # "" if it serves none of its own
    role: str                # prefill, decode or both
    backlog: int = 0
    num_jobs: int = 0
    has_room: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    workers: tuple[WorkerLoad, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """`cached`: prompt tokens that a worker's prefix cache has, by worker; who is not named has none, as far as is known."""

    num_tokens: int
    cached: Mapping[str, int] = field(default_factory=dict)


def choose_lane(request: RouteRequest, snapshot: Snapshot, policy: RoutingPolicy) -> str:
    """A worker's lane, `local` (any decode worker prefills it), or `any`."""
    takers = [load for load in snapshot.workers if load.role != "decode"]
    decoders = [load for load in snapshot.workers if load.role == "decode"]
    if policy.disagg_min_tokens > 0 and decoders:
        near = _best(request, decoders, policy) if policy.prefix_affinity else None
        if near is not None and request.num_tokens - request.cached[near.worker] < policy.disagg_min_tokens:
            return near.lane
        if request.num_tokens < policy.disagg_min_tokens and any(load.has_room for load in decoders):
            return LOCAL_LANE
    if policy.prefix_affinity:
        best = _best(request, takers, policy)
        if best is not None:
            return best.lane
    return ANY_LANE


def _best(request: RouteRequest, loads: list[WorkerLoad], policy: RoutingPolicy) -> WorkerLoad | None:
    """The worker whose cache saves most beyond its own backlog; None if for none of them it is worth it."""
    if not loads:
        return None
    least = min((load.backlog for load in loads if load.has_room), default=min(load.backlog for load in loads))
    by_chance = sum(min(request.cached.get(load.worker, 0), request.num_tokens) for load in loads) / len(loads)
    most_jobs = math.ceil(policy.max_load * (sum(load.num_jobs for load in loads) + 1) / len(loads)) + policy.slack
    best, best_gain = None, float(policy.min_saving)
    for load in loads:
        cached = min(request.cached.get(load.worker, 0), request.num_tokens)
        if not cached or not load.lane or not load.has_room or load.num_jobs + 1 > most_jobs:
            continue
        gain = cached - by_chance - (load.backlog - least)
        if gain >= best_gain and (best is None or gain > best_gain):
            best, best_gain = load, gain
    return best
