"""What a worker takes of which class, from a real queue."""

import asyncio

import pytest

from coordinator.bus import Bus, Delivery
from coordinator.messages import Job, JobClass, new_job_id
from workers.pulling import Pulling, job_consumers

pytestmark = pytest.mark.services

NUM_SLOTS = 16


class Slots:
    """Takes jobs up and holds their slots."""

    def __init__(self, bus: Bus, model: str) -> None:
        self.held: list[str] = []
        self.news = asyncio.Event()
        self.is_open_for_batch = True
        self.pulling = Pulling(bus, job_consumers(model), room=self.free, room_for_last=self.free_for_batch, num_slots=NUM_SLOTS,
                               handle=self.take)

    def free(self) -> int:
        return NUM_SLOTS - len(self.held)

    def free_for_batch(self) -> int:
        return self.free() if self.is_open_for_batch else 0

    async def take(self, delivery: Delivery) -> None:
        self.held.append(Job.decode(delivery.data).klass)
        self.news.set()

    async def wait_for(self, count: int) -> None:
        while len(self.held) < count:
            self.news.clear()
            await self.news.wait()


async def publish(bus: Bus, model: str, klass: JobClass, count: int) -> None:
    for _ in range(count):
        await bus.publish_job(Job(job_id=new_job_id(), origin="o", model=model, klass=klass, text="t"))


async def test_batch_leaves_slots_free_and_others_find_them_at_once(bus: Bus, model: str) -> None:
    slots = Slots(bus, model)
    await publish(bus, model, "batch", 40)
    await slots.pulling.start()
    try:
        await slots.wait_for(14)
        assert slots.held == ["batch"] * 14, "an eighth of the slots stays free"
        await publish(bus, model, "interactive", 2)
        await slots.wait_for(16)
        assert slots.held[14:] == ["interactive"] * 2
        del slots.held[:8]                     # half of the batch ends while interactive jobs come
        slots.pulling.on_change()
        await publish(bus, model, "interactive", 6)
        await slots.wait_for(14)
        assert slots.held.count("interactive") == 8 and slots.held.count("batch") == 6, "batch takes nothing of what it must leave free"
    finally:
        await slots.pulling.close()


async def test_a_worker_with_no_room_for_batch_goes_on_taking_the_others(bus: Bus, model: str) -> None:
    slots = Slots(bus, model)
    slots.is_open_for_batch = False
    await publish(bus, model, "batch", 6)
    await slots.pulling.start()
    try:
        await publish(bus, model, "normal", 3)
        await slots.wait_for(3)
        assert slots.held == ["normal"] * 3
        slots.held.clear()
        slots.is_open_for_batch = True
        slots.pulling.on_change()
        await slots.wait_for(4)
        assert slots.held == ["batch"] * 4, "what was left waited in the queue"
    finally:
        await slots.pulling.close()
