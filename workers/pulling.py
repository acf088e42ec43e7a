"""When to pull, how much, and from where. Pulling is the reservation: a worker asks only for what it has room for."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence

from coordinator import subjects
from coordinator.bus import Bus, Delivery, Puller
from coordinator.errors import Unavailable
from coordinator.messages import CLASSES
from coordinator.tasks import end

log = logging.getLogger(__name__)

PROBE_S = 2.0           # a pull that takes only what is there now
PROBE_DELAY_S = 0.005   # after an arrival
LOOK_AGAIN_S = 1.0      # without a sign of change, look at the room again after this
RETRY_S = 0.5
ACTIVE_S = 30.0         # a lane that brought something this recently is probed; the others have a pull standing open
KEPT_IDLE, KEPT_BUSY = 1 / 8, 3 / 4   # of the slots: what the last class leaves free, alone and while the classes above it bring jobs
BUSY_S = 5.0            # a class is taken to bring jobs so long after its last one
AGEING_S = 2.0          # however busy the classes above: one job of a class is taken once this time, per class above it


class Pulling:
    """Keeps `handle` supplied with deliveries, best class first, the lanes of a class in turn.

    classes         consumers by class, best first; within a class one per lane
    room            how many more deliveries may be taken up now; 0 stops pulling
    room_for_last   the same for the last class, which gives way to the others in the engine: it soaks up what is idle
    handle          takes up one delivery; runs as a task of its own
    num_slots       the last class leaves a part of so many slots free, so that what comes above it finds one at once, and small batches
                    to run in

    With room, one message per lane may come by itself (a pull stands open). When one came, the classes are emptied in their order as far
    as the room goes, one message per lane and round: a lower class is served when nothing waits above it, or when it has waited long.
    """

    def __init__(self, bus: Bus, classes: list[list[str]], *, room: Callable[[], int], room_for_last: Callable[[], int], num_slots: int,
                 handle: Callable[[Delivery], Coroutine[None, None, None]]) -> None:
        self._bus = bus
        self._classes = [list(lanes) for lanes in classes]
        self._room = room
        self._room_for_last = room_for_last
        self._handle = handle
        self._num_slots = num_slots
        self._above = {lane for lanes in classes[:-1] for lane in lanes}
        self._busy_until = 0.0
        self._changed = asyncio.Event()
        self._should_probe = True
        self._active_until: dict[str, float] = {}
        self._looked_at = [time.monotonic()] * len(classes)
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
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_AGAIN_S):  # wait_for() of Python 3.11 may swallow the cancellation by close()
                    await self._changed.wait()

    async def _fill_room(self) -> None:
        room = self._room() - len(self._taken_up)
        if room <= 0:
            self._should_probe = True
            self._want(0)
            return
        if not self._should_probe and self._left_for_last() > 0:
            return
        self._should_probe = False
        room -= await self._take_aged(room)
        *above, last = range(len(self._classes))
        for index in above:
            room -= await self._take_active(index, room)
        room_for_last = min(room, self._left_for_last())
        num_taken = await self._take_active(last, room_for_last)
        if num_taken >= room_for_last:
            self._should_probe = True
        if room > num_taken:
            self._want(1, 1 if room_for_last > num_taken else 0)

    async def _take_active(self, index: int, room: int) -> int:
        if room <= 0:
            return 0
        lanes, now = self._classes[index], time.monotonic()
        self._looked_at[index] = now
        return await self._take_in_turn([lane for lane in lanes if self._active_until.get(lane, 0.0) > now], lanes, room)

    def _left_for_last(self) -> int:
        kept = KEPT_BUSY if time.monotonic() < self._busy_until else KEPT_IDLE
        return self._room_for_last() - len(self._taken_up) - int(kept * self._num_slots)

    async def _take_aged(self, room: int) -> int:
        """One job of a class that the classes above it have kept waiting too long."""
        now, last = time.monotonic(), len(self._classes) - 1
        for index, lanes in enumerate(self._classes):
            if index == last and self._room_for_last() <= len(self._taken_up):
                continue
            if room > 0 and index > 0 and now - self._looked_at[index] > index * AGEING_S:
                self._looked_at[index] = now
                return await self._take_in_turn(list(lanes), lanes, 1)
        return 0

    async def _take_in_turn(self, lanes: list[str], order: list[str], room: int) -> int:
        """Up to `room` messages, one per lane and round. `order` is turned, so that the next call begins with another lane."""
        taken = 0
        while lanes and taken < room:
            batch = room - taken if len(lanes) == 1 else 1
            asked = lanes[: room - taken]
            probes = [await self._puller.pull(lane, batch, PROBE_S, no_wait=True) for lane in asked]
            for probe in probes:
                await probe.ended
            taken += sum(batch - probe.num_left for probe in probes)
            brought = [lane for lane, probe in zip(asked, probes, strict=True) if probe.num_left == 0]
            lanes = [*lanes[len(asked):], *brought]
        order.append(order.pop(0))
        return taken

    async def take_from(self, consumers: list[str], room: int) -> None:
        """What lies in these lanes now, up to `room` messages, one lane after the other."""
        for consumer in consumers:
            if room <= 0:
                return
            probe = await self._puller.pull(consumer, room, PROBE_S, no_wait=True)
            await probe.ended
            room = probe.num_left

    def _want(self, num_messages: int, of_last: int | None = None) -> None:
        for lanes in self._classes:
            wanted = of_last if lanes is self._classes[-1] and of_last is not None else num_messages
            for lane in lanes:
                self._puller.want(lane, wanted)

    async def _take_up_forever(self) -> None:
        while True:
            delivery = await self._puller.next()
            self._active_until[delivery.consumer] = time.monotonic() + ACTIVE_S
            if delivery.consumer in self._above:
                self._busy_until = time.monotonic() + BUSY_S
            task = asyncio.create_task(self._handle(delivery))
            self._taken_up.add(task)
            task.add_done_callback(self._done)
            self._should_probe = True
            # First things first: what arrived is taken up before more is asked for.
            asyncio.get_running_loop().call_later(PROBE_DELAY_S, self._changed.set)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._taken_up.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a delivery was left to its redelivery", exc_info=error)

    async def close(self) -> None:
        """Take nothing more; what arrived and was not taken up goes back to the queue. A second call does nothing."""
        await end(self._loops)
        await self._puller.close()

    async def settle(self) -> None:
        """Wait for what was taken up."""
        while self._taken_up:
            await asyncio.gather(*self._taken_up, return_exceptions=True)


def job_consumers(model: str, own_lanes: Iterable[str] = ()) -> list[list[str]]:
    """Of all lanes that any worker serves, and of `own_lanes` before them."""
    return lane_consumers(model, [*own_lanes, *subjects.job_lanes()])


def lane_consumers(model: str, lanes: Sequence[str]) -> list[list[str]]:
    """Of these lanes alone."""
    return [[subjects.jobs_consumer(model, klass, lane) for lane in lanes] for klass in CLASSES]


def handoff_consumers(model: str, own_lanes: Iterable[str] = ()) -> list[list[str]]:
    """`own_lanes` beside the first lane that any decode worker serves."""
    first, *others = [[subjects.handoff_consumer(model, lane)] for lane in subjects.handoff_lanes()]
    return [[*(subjects.handoff_consumer(model, lane) for lane in own_lanes), *first], *others]
