"""Lanes whose jobs nobody comes for: of a worker that is gone, leaving or stuck, or `local` without decode workers. Others are called.
Handles in the lane of a host without decode workers are void, or will be in a moment: they are dropped.

A part of the watcher: the leader looks. What it does may be done twice.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable

from coordinator.bus import Bus
from coordinator.connection import ApiError
from coordinator.errors import ConfigError, InvalidField
from coordinator.store import WorkerView

log = logging.getLogger(__name__)

MOST_LANES = 32      # of living workers, looked at in one round
MOST_CALLS = 8       # for one lane in one round


class LaneWatch:
    """`look` once every few seconds. Raises Unavailable."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._seen: dict[tuple[str, str], int] = {}      # (model, lane): how many it had delivered when some waited

    async def look(self, views: Iterable[WorkerView]) -> int:
        """Returns how many calls were made."""
        living: defaultdict[str, set[str]] = defaultdict(set)
        for view in views:
            if view.is_serving:
                living[str(view.info.get("model", ""))] |= {*view.info.get("lanes", ()), *view.info.get("handoff_lanes", ())}
        for model, lane in await self._bus.host_lanes():
            if lane not in living[model]:     # their givers take them back, and offer them to all
                await self._bus.purge_handoff_lane(model, lane)
        num_calls = 0
        seen: dict[tuple[str, str], int] = {}
        lanes = await self._bus.private_lanes()
        # Lanes of the living come last: most of what stands there is being worked on, and only a stuck one needs others.
        ordered = sorted(lanes, key=lambda at: at[1] in living[at[0]])
        num_orphaned = sum(lane not in living[model] for model, lane in ordered)
        for model, lane in ordered[:num_orphaned + MOST_LANES]:
            try:
                num_calls += await self._look_at(model, lane, seen, is_served=lane in living[model])
            except (ApiError, ConfigError, InvalidField) as error:     # whoever may submit may write any name there
                log.warning("lane %s of model %s not looked at: %s", lane, model, error)
        self._seen = seen
        return num_calls

    async def _look_at(self, model: str, lane: str, seen: dict[tuple[str, str], int], *, is_served: bool) -> int:
        if not is_served:
            await self._bus.ensure_lane(model, lane)     # it may be a name that nobody ever served
        state = await self._bus.lane_state(model, lane)
        num_waiting = state["pending"]
        if is_served:
            if num_waiting:
                seen[model, lane] = state["num_delivered"]
            if self._seen.get((model, lane)) != state["num_delivered"]:
                return 0     # nothing waited, or somebody came by since
        else:
            num_waiting += state["ack_pending"]      # some of them may wait to be delivered again
        num_calls = min(num_waiting, MOST_CALLS)
        for _ in range(num_calls):
            await self._bus.call_for_relief(model, lane)
        return num_calls
