"""The orders that a worker was given: which role it is to have, and whether it is to leave. Knows nothing of engines and jobs."""

import asyncio
import logging

from coordinator import subjects
from coordinator.bus import Bus, Message, Subscription
from coordinator.errors import MalformedMessage
from coordinator.messages import encode_map
from coordinator.orders import Order

log = logging.getLogger(__name__)


class OrderBook:
    """`came` is set by each order that changes something; whoever carries it out clears it."""

    def __init__(self, worker: str, role: str, why_not_leave: str = "") -> None:
        """`why_not_leave`: what keeps it from leaving alone, if anything does."""
        self.role = role
        self._why_not_leave = why_not_leave
        self.is_leaving = False
        self.came = asyncio.Event()
        self._worker = worker
        self._bus: Bus | None = None
        self._subscription: Subscription | None = None

    async def open(self, bus: Bus) -> None:
        self._bus = bus
        self._subscription = await bus.subscribe(subjects.control(self._worker), self._take)

    async def close(self) -> None:
        if self._subscription is not None:
            await self._subscription.close()

    async def _take(self, message: Message) -> None:
        assert self._bus is not None
        try:
            answer = {"taken": self._follow(Order.decode(message.data))}
        except MalformedMessage as error:
            answer = {"refused": str(error)}
        if message.reply:
            await self._bus.publish(message.reply, encode_map(answer))

    def _follow(self, order: Order) -> str:
        if order.kind == "drain":
            if self.is_leaving:
                return "it is leaving already"
            if self._why_not_leave:
                raise MalformedMessage(self._why_not_leave)
            self.is_leaving = True
            said = "takes nothing new, ends what runs, and leaves"
        else:
            if self.is_leaving:
                raise MalformedMessage("it is leaving")
            if order.role == self.role:
                return f"it is {order.role} already"
            said = f"takes nothing new, ends what runs, and goes on as {order.role}"
            self.role = order.role
        log.info("order: %s", said)
        self.came.set()
        return said
