"""A closed loop of clients over a list of specs, and the moments at which a killer wants to strike."""

import asyncio
from collections.abc import Sequence

from tests.chaos.answer import Answer
from tests.chaos.clients import Clients
from tests.chaos.workload import Spec


class Load:
    """`num_clients` clients, each with one job at a time, until every spec is answered."""

    def __init__(self, clients: Clients, specs: Sequence[Spec], num_clients: int) -> None:
        self.answers: list[Answer] = []
        self._clients = clients
        self._left = list(reversed(specs))
        self._num_clients = num_clients
        self._num_specs = len(specs)
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="load")

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_clients):
                group.create_task(self._one_client())

    async def _one_client(self) -> None:
        while self._left:
            answer = await self._clients.ask(self._left.pop())
            async with self._changed:
                self.answers.append(answer)
                self._changed.notify_all()

    async def until_answered(self, share: float) -> None:
        """Until this share of all jobs is answered; at once when the load is over."""
        wanted = min(self._num_specs, int(share * self._num_specs))
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.answers) >= wanted)

    async def finish(self, timeout_s: float) -> list[Answer]:
        """All answers. Raises TimeoutError when some do not come."""
        assert self._task is not None
        async with asyncio.timeout(timeout_s):
            await self._task
        return self.answers

    async def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
