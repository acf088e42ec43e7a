"""When to pull, how much, and from which class. Pulling is the reservation: a worker asks only for what it has room for."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

from coordinator import subjects
from coordinator.bus import Bus, Delivery, Puller
from coordinator.errors import Unavailable
from coordinator.messages import CLASSES

log = logging.getLogger(__name__)

PROBE_S = 2.0           # a pull that takes only what is there now
LOOK_AGAIN_S = 1.0      # without a sign of change, look at the room again after this
RETRY_S = 0.5


class Pulling:
    """Keeps `handle` supplied with deliveries, best class first.

    consumers   names, best class first
    room        how many more deliveries may be taken up now; 0 stops pulling
    handle      takes up one delivery; runs as a task of its own

    With room, one message per class may come by itself (a pull stands open). When one came, the classes are emptied in their
    order as far as the room goes: a lower class is served only when nothing waits above it.
    """

    def __init__(self, bus: Bus, consumers: list[str], room: Callable[[], int], handle: Callable[[Delivery], Coroutine[None, None, None]]) -> None:
        self._bus = bus
        self._consumers = consumers
        self._room = room
        self._handle = handle
        self._changed = asyncio.Event()
        self._should_probe = True
        self._taken_up: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._puller: Puller

    async def start(self) -> None:
        self._puller = await Puller.open(self._bus)
        self._loops = [asyncio.create_task(self._pull_forever(), name="pull"), asyncio.create_task(self._take_up_forever(), name="take up")]

    def on_change(self) -> None:
        """Room may have been made."""
        self._changed.set()

    async def _pull_forever(self) -> None:
        while True:
            self._changed.clear()
            try:
                await self._fill_room()
            except Unavailable as error:
                log.warning("pull: %s", error)
                await asyncio.sleep(RETRY_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_AGAIN_S)

    async def _fill_room(self) -> None:
        room = self._room() - len(self._taken_up)
        if room <= 0:
            self._should_probe = True
            for consumer in self._consumers:
                self._puller.want(consumer, 0)
            return
        if not self._should_probe:
            return
        self._should_probe = False
        for consumer in self._consumers:
            probe = await self._puller.pull(consumer, room, PROBE_S, no_wait=True)
            await probe.ended
            room = probe.num_left
            if room <= 0:
                self._should_probe = True
                return
        for consumer in self._consumers:
            self._puller.want(consumer, 1)

    async def _take_up_forever(self) -> None:
        while True:
            delivery = await self._puller.next()
            task = asyncio.create_task(self._handle(delivery))
            self._taken_up.add(task)
            task.add_done_callback(self._done)
            self._should_probe = True
            self._changed.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._taken_up.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a delivery was left to its redelivery", exc_info=error)

    async def close(self) -> None:
        """Take nothing more; what arrived and was not taken up goes back to the queue. A second call does nothing."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._puller.close()

    async def settle(self) -> None:
        """Wait for what was taken up."""
        while self._taken_up:
            await asyncio.gather(*self._taken_up, return_exceptions=True)


def job_consumers(model: str) -> list[str]:
    return [subjects.jobs_consumer(model, klass) for klass in CLASSES]


def handoff_consumers(model: str) -> list[str]:
    return [subjects.handoff_consumer(model)]
