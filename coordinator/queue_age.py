"""How long the oldest message of a consumer has waited for its first delivery."""

import asyncio
import time
from collections.abc import Iterable
from datetime import datetime

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.connection import ApiError
from coordinator.jetstream import MESSAGE_NOT_FOUND
from coordinator.provisioning import CONSUMER_NOT_FOUND

CLASSES = ("interactive", "normal")     # batch work waits by design


async def jobs_age_s(bus: Bus, model: str, served: Iterable[str] = ()) -> float:
    """Of jobs that no worker has yet, in the lanes of all and in those of the `served` ones in which jobs stand. Raises Unavailable."""
    served = set(served)
    private = [lane for at, lane in await bus.private_lanes() if at == model and lane in served] if served else []
    lanes = [(subjects.jobs_consumer(model, klass, lane), subjects.jobs(model, klass, lane))
             for klass in CLASSES for lane in (*subjects.job_lanes(), *private)]
    return max(await asyncio.gather(*(_oldest_s(bus, subjects.JOBS, consumer, subject) for consumer, subject in lanes)))


async def handoff_age_s(bus: Bus, model: str, hosts: Iterable[str] = ()) -> float:
    """Of KV handles that no decode worker has yet, in the lane of all and in those of these hosts. Raises Unavailable."""
    lanes = [subjects.ANY_LANE, *(subjects.host_lane(host) for host in hosts)]
    return max(await asyncio.gather(*(
        _oldest_s(bus, subjects.HANDOFF, subjects.handoff_consumer(model, lane), subjects.handoff(model, lane)) for lane in lanes)))


async def _oldest_s(bus: Bus, stream: str, consumer: str, subject: str) -> float:
    try:
        info = await bus.api(f"CONSUMER.INFO.{stream}.{consumer}")
        if not info["num_pending"]:
            return 0.0
        query = {"seq": info["delivered"]["stream_seq"] + 1, "next_by_subj": subject}
        stored_at = (await bus.api(f"STREAM.MSG.GET.{stream}", query))["message"]["time"]
    except ApiError as error:
        if error.err_code in (MESSAGE_NOT_FOUND, CONSUMER_NOT_FOUND):     # delivered meanwhile; a lane that nobody serves
            return 0.0
        raise
    # The server writes nanoseconds; clocks of two machines may differ, an age below nothing is none.
    return max(0.0, time.time() - datetime.fromisoformat(stored_at[:19] + "+00:00").timestamp() - float("0" + stored_at[19:-1]))
