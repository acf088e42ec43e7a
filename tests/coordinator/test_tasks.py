"""Tasks that were ended have ended, also those that swallowed a cancellation."""

import asyncio

from coordinator.tasks import end


async def test_a_task_that_swallowed_its_cancellation_is_asked_again() -> None:
    swallowed = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(1)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await end([task])
    assert task.cancelled() and swallowed == [1]


async def test_how_a_task_ended_is_nobodys_concern() -> None:
    async def fails() -> None:
        raise ValueError("x")

    over = asyncio.create_task(fails())
    await asyncio.sleep(0)
    await end([over])
    await end([])
    assert over.done()
