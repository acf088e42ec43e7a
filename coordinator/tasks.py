"""End asyncio tasks so that they have ended."""

import asyncio
from collections.abc import Iterable
from typing import Any

ASK_AGAIN_S = 0.2


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel, and return once all are over; how they ended is nobody's concern.

    Asks again: a cancellation that meets a completion may be swallowed on its way through a library (wait_for of Python 3.11 does so),
    and a task that loops for ever would then never end.
    """
    waiting = set(tasks)
    while waiting:
        for task in waiting:
            task.cancel()
        done, waiting = await asyncio.wait(waiting, timeout=ASK_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved, so that nobody reports it as lost
