"""Jobs in a worker's own lane that it does not get to are taken by others, where they lie: the message, its sequence and its claim stay.

    worker without room for LANE_WAIT_S  --call-->  one worker of the model (a queue group)  --pulls from that lane, if it has room;
    watcher, for a lane without a worker --call-->                                              else passes the call on

A call is a core message and may be lost; it is repeated while there is need.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from coordinator import subjects
from coordinator.bus import Bus, Message
from coordinator.errors import MalformedMessage, Unavailable
from coordinator.messages import CLASSES, decode_map
from coordinator.tasks import end

log = logging.getLogger(__name__)

LANE_WAIT_S = 1.0        # a job waits so long in the lane of a worker without room before others may have it
LOOK_S = 0.25            # at the room, which costs nothing
ASK_S = 1.0              # at what waits in the lane, which costs the server three answers
MOST_HOPS = 16
MOST_TAKEN = 4           # by one call


class Relief:
    """`room` and `take(consumers, count)` are the pulling's: `take` brings what is there now, up to `count`."""

    def __init__(self, bus: Bus, model: str, own_lane: str, room: Callable[[], int],
                 take: Callable[[list[str], int], Awaitable[None]]) -> None:
        """`own_lane` "": there is none, and no call for it."""
        self._bus = bus
        self._model = model
        self._lane = own_lane
        self._room = room
        self._take = take
        self._full_since: float | None = None
        self._ask_at = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._calls = await self._bus.subscribe(subjects.relief(self._model), self._on_call, queue="relief")
        if self._lane:
            self._task = asyncio.create_task(self._call_forever(), name="relief")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])
        await self._calls.close()

    async def _call_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._room() > 0:
                self._full_since = None
                continue
            now = time.monotonic()
            self._full_since = self._full_since or now
            if now - self._full_since >= LANE_WAIT_S and now >= self._ask_at:
                self._ask_at = now + ASK_S
                try:
                    if (await self._bus.lane_state(self._model, self._lane))["pending"]:
                        await self._bus.call_for_relief(self._model, self._lane)
                except Unavailable as error:
                    log.info("no call for relief: %s", error)

    async def _on_call(self, message: Message) -> None:
        try:
            body = decode_map(message.data)
            lane, hops = str(body["lane"]), int(body["hops"])
        except (MalformedMessage, KeyError, ValueError):
            return
        room = min(self._room(), MOST_TAKEN)
        try:
            if room > 0:
                await self._take([subjects.jobs_consumer(self._model, klass, lane) for klass in CLASSES], room)
            elif hops < MOST_HOPS:
                await self._bus.call_for_relief(self._model, lane, hops + 1)
        except Unavailable as error:
            log.info("call for relief of lane %s not answered: %s", lane, error)
