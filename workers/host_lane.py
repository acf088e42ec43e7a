"""Handles go to decode workers of the same host first: there pages are mapped or copied over NVLink, elsewhere they cross the network.

Only while decode workers live both here and elsewhere is there a choice, and only then a lane of its host is used. A handle that nobody
took there within HOST_WAIT_S is taken back (a new epoch voids it) and offered to all.
"""

import asyncio
import logging
import time
from collections.abc import Iterable

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.errors import TokenmillError, Unavailable
from coordinator.store import Store, WorkerView
from coordinator.tasks import end
from workers.active_job import ActiveJob

log = logging.getLogger(__name__)

HOST_WAIT_S = 1.0
REFRESH_S = 5.0


def offer_lane(views: Iterable[WorkerView], host: str) -> str:
    """The lane for a handle made on `host`, by the farm's workers. Pure."""
    lane = subjects.host_lane(host)
    decoders = [view for view in views if view.is_serving and view.role == "decode"]
    are_here = [lane in view.info.get("handoff_lanes", ()) for view in decoders]
    return lane if any(are_here) and not all(are_here) else subjects.ANY_LANE


class HostLane:
    """The giver's part: which lane to offer in, and what stands in the lane of the host."""

    def __init__(self, bus: Bus, store: Store, model: str, host: str) -> None:
        self._bus = bus
        self._store = store
        self._model = model
        self._host = host
        self._lane = subjects.ANY_LANE
        self._offers: dict[str, tuple[float, int]] = {}    # key of a job -> when it was offered in the host's lane, and the sequence there
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._refresh_forever(), name="host lane")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    async def publish(self, active: ActiveJob, handle: bytes) -> None:
        """Offer: in the host's lane if that makes sense now and this job was not in it before. Raises Unavailable."""
        lane = subjects.ANY_LANE if active.key in self._offers else self._lane
        if active.is_background:
            lane = subjects.BACKGROUND_LANE
        seq = await self._bus.publish_handoff(self._model, handle, lane=lane)
        if lane.startswith(subjects.HOST_LANE):
            self._offers[active.key] = (time.monotonic(), seq)
        else:
            self._offers.pop(active.key, None)

    def is_overdue(self, active: ActiveJob) -> bool:
        """It has waited in the host's lane for long enough."""
        offer = self._offers.get(active.key)
        return offer is not None and time.monotonic() - offer[0] > HOST_WAIT_S

    async def withdraw(self, active: ActiveJob) -> None:
        """Its handle there is void: nobody needs to look at it any more. Harmless when that fails."""
        offer = self._offers.get(active.key)
        if offer is not None:
            try:
                await self._bus.delete_handoff(offer[1])
            except Unavailable as error:
                log.info("job %s: void handle left in the lane of host %s: %s", active.job.job_id, self._host, error)

    def forget(self, active: ActiveJob) -> None:
        self._offers.pop(active.key, None)

    def keep(self, keys: set[str]) -> None:
        """These jobs are here still; the others ended otherwise, cancelled or lost."""
        self._offers = {key: offer for key, offer in self._offers.items() if key in keys}

    async def _refresh_forever(self) -> None:
        while True:
            try:
                self._lane = offer_lane(await self._store.workers(self._model), self._host)
            except TokenmillError as error:
                log.info("host lane: %s", error)
            await asyncio.sleep(REFRESH_S)
