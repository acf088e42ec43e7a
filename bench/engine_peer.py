"""One engine process driven over its own channel, without queue, registry or HTTP: what is left is the engine's own time to first token."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from time import perf_counter

from coordinator.messages import pack_ids
from coordinator.sampling import SamplingParams
from workers.engine_link import EngineLink
from workers.engine_messages import AddSequence, Event, Failed, Ready, Tokens
from workers.settings import EngineSettings


class EnginePeer:
    """Answers one prompt at a time."""

    def __init__(self, link: EngineLink, events: AsyncIterator[Event]) -> None:
        self._link = link
        self._events = events
        self._num_sent = 0

    async def first_token_s(self, prompt_ids: Sequence[int]) -> float:
        """Seconds from the command to the event that carries the first token."""
        self._num_sent += 1
        job_id = f"bench-{self._num_sent}"
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)
        command = AddSequence(job_id=job_id, token_ids=pack_ids(prompt_ids), num_prompt=len(prompt_ids), params=params)
        started = perf_counter()
        self._link.send(command)
        async for event in self._events:
            if isinstance(event, Tokens) and any(row.job_id == job_id for row in event.rows):
                return perf_counter() - started
            if isinstance(event, Failed):
                raise RuntimeError(f"the engine refused a prompt: {event.error}")
        raise RuntimeError("the engine is gone")


@contextlib.asynccontextmanager
async def running_engine(settings: EngineSettings) -> AsyncIterator[EnginePeer]:
    link = await EngineLink.start(settings)
    try:
        events = aiter(link.events())
        async for event in events:
            if isinstance(event, Ready):
                break
        yield EnginePeer(link, events)
    finally:
        await link.stop()
