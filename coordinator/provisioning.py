"""Make the streams and consumers that the farm needs, or bring existing ones in line. Idempotent, and safe to run in parallel.

`required` settings are what the protocol rests on: they are enforced at each call. `initial` ones are set when a stream is
created and then belong to the operator (sizes, ages, replicas), like every setting that is not named here.
"""

import logging
import uuid
from dataclasses import dataclass, field
from typing import Any

from coordinator import subjects
from coordinator.connection import SIZE_MARGIN_BYTES, ApiError
from coordinator.errors import ConfigError
from coordinator.jetstream import STREAM_NOT_FOUND, JetStream
from coordinator.messages import CLASSES, check_id

logger = logging.getLogger(__name__)

LEAST_SERVER_VERSION = (2, 11)      # batched direct gets
CONSUMER_NOT_FOUND, NAME_IN_USE, NO_STORAGE = 10014, 10058, 10047
NANOS = 1_000_000_000
OUT_MAX_BYTES = 2 * 1024**3         # oldest frames go first: must hold the output of all jobs that still run
DLQ_MAX_MSGS = 100_000
MAX_WAITING_PULLS = 4096            # open pulls per consumer, all workers together
PROVISION_DEADLINE_S = 15.0
LANE_INACTIVE_S = 3600.0            # lanes of workers that are gone leave nothing behind; the watcher makes them anew if jobs stand there


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    name: str
    required: dict[str, Any]
    initial: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    stream: str
    name: str
    filter_subject: str
    inactive_s: float = 0.0     # the server drops it after so long without a pull; 0: never


def streams(max_queued: int | None) -> list[StreamSettings]:
    """All streams. `max_queued` bounds each job subject; None leaves an existing bound alone."""
    bound = {"max_msgs_per_subject": max_queued or subjects.DEFAULT_MAX_QUEUED}
    work = {"retention": "workqueue", "max_age": 0}   # an age would silently expire jobs that are being worked on
    keep = {"retention": "limits"}
    return [
        StreamSettings(name=subjects.JOBS, initial={} if max_queued else bound, required={
            "subjects": ["jobs.>"], **work, "discard": "new", "discard_new_per_subject": True, **(bound if max_queued else {})}),
        StreamSettings(name=subjects.HANDOFF, required={"subjects": ["handoff.>"], **work}),
        StreamSettings(name=subjects.OUT, initial={"max_age": _nanos(subjects.OUT_MAX_AGE_S), "max_bytes": OUT_MAX_BYTES}, required={
            "subjects": ["out.>"], **keep, "discard": "old", "allow_direct": True, "republish": {"src": "out.>", "dest": "live.>"}}),
        StreamSettings(name=subjects.RESULTS, initial={"max_age": _nanos(subjects.RESULTS_MAX_AGE_S)}, required={
            "subjects": ["results.>"], **keep, "allow_direct": True}),
        StreamSettings(name=subjects.DLQ, initial={"max_age": _nanos(subjects.DLQ_MAX_AGE_S), "max_msgs": DLQ_MAX_MSGS}, required={
            "subjects": ["dlq.>"], **keep, "discard": "old", "allow_direct": True}),
        StreamSettings(name=subjects.ROSTER, initial={"max_age": _nanos(subjects.ROSTER_MAX_AGE_S)}, required={
            "subjects": ["roster.>"], **keep, "discard": "old", "max_msgs_per_subject": 1}),
    ]


def consumers(model: str) -> list[ConsumerSettings]:
    """The consumers of one model's lanes that any worker serves."""
    jobs = [ConsumerSettings(stream=subjects.JOBS, name=subjects.jobs_consumer(model, klass, lane),
                             filter_subject=subjects.jobs(model, klass, lane)) for klass in CLASSES for lane in subjects.job_lanes()]
    handoff = [ConsumerSettings(stream=subjects.HANDOFF, name=subjects.handoff_consumer(model, lane),
                                filter_subject=subjects.handoff(model, lane)) for lane in subjects.handoff_lanes()]
    return [*jobs, *handoff]


def lane_consumers(model: str, lane: str) -> list[ConsumerSettings]:
    """The consumers of a lane that not every worker serves."""
    return [ConsumerSettings(stream=subjects.JOBS, name=subjects.jobs_consumer(model, klass, lane),
                             filter_subject=subjects.jobs(model, klass, lane), inactive_s=LANE_INACTIVE_S) for klass in CLASSES]


async def ensure_lane(connection: JetStream, model: str, lane: str) -> None:
    """Consumers of a worker's own lane, or of `local`. Raises ConfigError, InvalidField, Unavailable."""
    check_id("lane", lane)
    for consumer in lane_consumers(model, lane):
        await connection.retry(lambda attempt_s, c=consumer: _ensure_consumer(connection, c, attempt_s),  # type: ignore[misc]
                               PROVISION_DEADLINE_S, f"provisioning of consumer {consumer.name}")


async def ensure_handoff_lane(connection: JetStream, model: str, lane: str) -> None:
    """The consumer of one host's lane. Raises ConfigError, InvalidField, Unavailable."""
    consumer = ConsumerSettings(stream=subjects.HANDOFF, name=subjects.handoff_consumer(model, check_id("lane", lane)),
                                filter_subject=subjects.handoff(model, lane), inactive_s=LANE_INACTIVE_S)
    await connection.retry(lambda attempt_s: _ensure_consumer(connection, consumer, attempt_s), PROVISION_DEADLINE_S,
                           f"provisioning of consumer {consumer.name}")


async def provision(connection: JetStream, model: str, max_queued: int | None) -> bool:
    """True if this call created the JOBS stream. Raises ConfigError, InvalidField (model), Unavailable."""
    check_id("model", model)
    if connection.server_version < LEAST_SERVER_VERSION:
        have, least = (".".join(map(str, version)) for version in (connection.server_version, LEAST_SERVER_VERSION))
        raise ConfigError(f"nats-server at {connection.address} is {have}: {least} or newer is needed")
    if connection.max_message_bytes + SIZE_MARGIN_BYTES < subjects.MAX_PAYLOAD_BYTES:
        logger.warning("nats-server at %s takes messages of at most %d bytes: set max_payload to 8MB for long prompts",
                       connection.address, connection.max_message_bytes)
    if max_queued is not None and max_queued < 1:
        raise ConfigError(f"max_queued must be at least 1, got {max_queued}")
    mark = f"tokenmill {uuid.uuid4()}"
    created = [settings.name for settings in streams(max_queued)
               if await connection.retry(lambda attempt_s, s=settings: _ensure_stream(connection, s, mark, attempt_s),  # type: ignore[misc]
                                         PROVISION_DEADLINE_S, f"provisioning of stream {settings.name}")]
    for consumer in consumers(model):
        await connection.retry(lambda attempt_s, c=consumer: _ensure_consumer(connection, c, attempt_s),  # type: ignore[misc]
                               PROVISION_DEADLINE_S, f"provisioning of consumer {consumer.name}")
    return subjects.JOBS in created


async def _ensure_stream(connection: JetStream, settings: StreamSettings, mark: str, attempt_s: float) -> bool:
    """True if this call, or an earlier try of it, created the stream."""
    name = settings.name
    try:
        existing = (await connection.api(f"STREAM.INFO.{name}", timeout_s=attempt_s))["config"]
    except ApiError as error:
        if error.err_code != STREAM_NOT_FOUND:
            raise
        # The server takes a second creation with an equal configuration for the first one's repetition. The mark makes
        # configurations differ, so that of several creators exactly one wins.
        config = {"name": name, "storage": "file", "num_replicas": 1, **settings.initial, **settings.required,
                  "metadata": {"created_by": mark}}
        try:
            await connection.api(f"STREAM.CREATE.{name}", config, attempt_s)
            return True
        except ApiError as refused:
            if refused.err_code == NO_STORAGE:
                raise ConfigError(f"NATS has no room for stream {name}: raise jetstream.max_file_store or free disk space") from None
            if refused.err_code != NAME_IN_USE:
                raise
        existing = (await connection.api(f"STREAM.INFO.{name}", timeout_s=attempt_s))["config"]
    if any(existing.get(key) != value for key, value in settings.required.items()):
        try:
            await connection.api(f"STREAM.UPDATE.{name}", {**existing, **settings.required}, attempt_s)
        except ApiError as error:
            if error.may_pass:
                raise
            raise ConfigError(f"stream {name} exists with settings that cannot be brought in line: {error}") from None
    return bool((existing.get("metadata") or {}).get("created_by") == mark)


async def _ensure_consumer(connection: JetStream, settings: ConsumerSettings, attempt_s: float) -> None:
    where = f"{settings.stream}.{settings.name}"
    required = {"durable_name": settings.name, "name": settings.name, "filter_subject": settings.filter_subject,
                "ack_policy": "explicit", "ack_wait": _nanos(subjects.ACK_WAIT_S), "max_ack_pending": subjects.MAX_ACK_PENDING,
                "max_deliver": -1, **({"inactive_threshold": _nanos(settings.inactive_s)} if settings.inactive_s else {})}
    try:
        existing = (await connection.api(f"CONSUMER.INFO.{where}", timeout_s=attempt_s))["config"]
    except ApiError as error:
        if error.err_code != CONSUMER_NOT_FOUND:
            raise
        existing = {"deliver_policy": "all", "max_waiting": MAX_WAITING_PULLS}
    if any(existing.get(key) != value for key, value in required.items()):
        request = {"stream_name": settings.stream, "config": {**existing, **required}, "action": ""}
        try:
            await connection.api(f"CONSUMER.CREATE.{where}.{settings.filter_subject}", request, attempt_s)
        except ApiError as error:
            if error.may_pass:
                raise
            raise ConfigError(f"consumer {settings.name} cannot be made: {error}") from None


def _nanos(seconds: float) -> int:
    return int(seconds * NANOS)
