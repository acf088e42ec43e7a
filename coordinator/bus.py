"""The farm's bus: jobs, hand-overs, chains of token frames, results, dead letters and the roster, over one NATS connection.

What is stored where, and with which settings, is in subjects.py and provisioning.py; how chains fence is in chain.py; how
messages are taken is in pull.py. Every method that talks to the broker raises Unavailable when it cannot be reached in time.
"""

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypedDict

from coordinator import chain, provisioning, pull, subjects
from coordinator.chain import EXPECTED_LAST, Chain
from coordinator.connection import (
    TOO_MANY_MESSAGES,
    ApiError,
    Callback,
    Message,
    NobodyListens,
    Subscription,
)
from coordinator.errors import MalformedMessage, QueueFull, Unavailable
from coordinator.jetstream import WRONG_LAST_SEQUENCE, JetStream, StoredMessage
from coordinator.messages import CLASSES, DeadLetter, FinalRecord, Frame, Job, encode_map
from coordinator.pull import AckInfo, Delivery, Puller, parse_ack_subject

__all__ = ["AckInfo", "Bus", "Callback", "Chain", "Counters", "Delivery", "Message", "NobodyListens", "Puller", "Subscription",
           "parse_ack_subject"]

logger = logging.getLogger(__name__)

MESSAGE_ID = "Nats-Msg-Id"       # publishes with an id that the stream saw in the last two minutes are stored once
PUBLISH_DEADLINE_S = 5.0
READ_DEADLINE_S = 10.0
HEADER_ROOM_BYTES = 2048


class Counters(TypedDict):
    """One model's queues. Depths count messages that wait or are being worked on; `pending` wait, `ack_pending` are at work."""

    jobs: dict[str, int]               # by class
    jobs_pending: dict[str, int]
    jobs_ack_pending: dict[str, int]
    handoff: int
    handoff_pending: int
    handoff_ack_pending: int
    dlq: int


class LaneState(TypedDict):
    """`pending` were never delivered; of `ack_pending` some are at work and some wait to be delivered again."""

    pending: int
    ack_pending: int
    num_delivered: int      # ever, repeats too


class Bus(JetStream):
    """Made by `await Bus.connect(url, name, on_fatal)`; an async context manager. `malformed_frames` counts frames left out by reads."""

    def __init__(self, url: str, name: str, on_fatal: Callable[[Exception], None] | None) -> None:
        super().__init__(url, name, on_fatal)
        self.malformed_frames = 0

    @classmethod
    async def connect(cls, url: str, name: str, on_fatal: Callable[[Exception], None] | None = None, *, timeout_s: float = 10.0) -> Self:
        """url: one server, or several separated by commas. Raises Unavailable if none answers in time."""
        return await super().connect(url, name, on_fatal, timeout_s=timeout_s)

    async def provision(self, model: str, max_queued: int | None = None) -> bool:
        """Make or align all streams and this model's consumers; True if the JOBS stream is new: a farm without a past.

        `max_queued` bounds each class of jobs (all models alike); None keeps the bound that is there, else DEFAULT_MAX_QUEUED.
        Raises ConfigError when a stream of that name cannot be brought in line.
        """
        return await provisioning.provision(self, model, max_queued)

    # --- jobs and hand-overs ------------------------------------------------------------------------------------------------

    async def publish_job(self, job: Job, *, lane: str = "", message_id: str = "",
                          deadline_s: float = PUBLISH_DEADLINE_S) -> int:
        """Accept a job: when this returns (its stream sequence) it is durable. Raises QueueFull, PayloadTooLarge, Unavailable.

        After Unavailable it may or may not be queued; the same job published again within two minutes is queued once. A replay
        that must not count as that repetition names a `message_id` of its own (default: the job id).
        """
        subject = subjects.jobs(job.model, job.klass, lane or subjects.tenant_lane(job.tenant))
        return await self._publish_once(subject, job.encode(), message_id or job.job_id, deadline_s)

    async def publish_handoff(self, model: str, handle: bytes, *, lane: str = subjects.ANY_LANE,
                              deadline_s: float = PUBLISH_DEADLINE_S) -> int:
        """Offer an encoded KVHandle to the model's decode workers. Raises PayloadTooLarge, Unavailable."""
        return await self._publish_once(subjects.handoff(model, lane), handle, uuid.uuid4().hex, deadline_s)

    async def ack(self, ack_subject: str) -> None:
        await pull.ack(self, ack_subject)

    async def ack_sync(self, ack_subject: str, deadline_s: float = 5.0) -> None:
        await pull.ack_sync(self, ack_subject, deadline_s)

    async def nak(self, ack_subject: str, delay_s: float = 0.0) -> None:
        await pull.nak(self, ack_subject, delay_s)

    async def progress(self, ack_subject: str) -> None:
        await pull.progress(self, ack_subject)

    async def term(self, ack_subject: str, reason: str = "") -> None:
        await pull.term(self, ack_subject, reason)

    async def last_job_seq(self) -> int:
        """Stream sequence of the youngest job."""
        info = await self.retry(lambda attempt_s: self.api(f"STREAM.INFO.{subjects.JOBS}", timeout_s=attempt_s),
                                READ_DEADLINE_S, "state of stream JOBS")
        return int(info["state"]["last_seq"])

    async def counters(self, model: str) -> Counters:
        pending, ack_pending = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
        for info in await self._consumer_infos(subjects.JOBS):
            owner, klass = subjects.jobs_parts(info["config"].get("filter_subject", ""))[:2]
            if owner == model and klass in CLASSES:
                pending[klass] += int(info["num_pending"])
                ack_pending[klass] += int(info["num_ack_pending"])
        handoff = [info for info in await self._consumer_infos(subjects.HANDOFF)
                   if info["config"].get("filter_subject", "").startswith(f"handoff.{model}.")]
        jobs_depth = await self._depths(subjects.JOBS, f"jobs.{model}.>")
        handoff_depth = await self._depths(subjects.HANDOFF, f"handoff.{model}.>")
        dlq_depth = await self._depths(subjects.DLQ, subjects.dead_letter(model))
        return {
            "jobs": {klass: sum(n for subject, n in jobs_depth.items() if subject.split(".")[2] == klass) for klass in CLASSES},
            "jobs_pending": pending,
            "jobs_ack_pending": ack_pending,
            "handoff": sum(handoff_depth.values()),
            "handoff_pending": sum(int(info["num_pending"]) for info in handoff),
            "handoff_ack_pending": sum(int(info["num_ack_pending"]) for info in handoff),
            "dlq": sum(dlq_depth.values()),
        }

    # --- lanes that not every worker serves ---------------------------------------------------------------------------------

    async def ensure_lane(self, model: str, lane: str) -> None:
        """Make the consumers of a worker's own lane, or of `local`, unless they are there. Raises ConfigError, Unavailable."""
        await provisioning.ensure_lane(self, model, lane)

    async def ensure_handoff_lane(self, model: str, lane: str) -> None:
        """Make the consumer of one host's lane unless it is there. Raises ConfigError, Unavailable."""
        await provisioning.ensure_handoff_lane(self, model, lane)

    async def host_lanes(self) -> list[tuple[str, str]]:
        """(model, lane) of HANDOFF's lanes of single hosts in which handles stand."""
        parts = (subject.split(".") for subject in await self._depths(subjects.HANDOFF, "handoff.>"))
        return sorted((part[1], part[2]) for part in parts if len(part) == 3 and part[2].startswith(subjects.HOST_LANE))

    async def delete_handoff(self, seq: int) -> None:
        """A handle that is void. One that is gone already is fine."""
        with contextlib.suppress(ApiError):
            await self.retry(lambda attempt_s: self.api(f"STREAM.MSG.DELETE.{subjects.HANDOFF}", {"seq": seq}, attempt_s),
                             READ_DEADLINE_S, f"deletion of handle {seq}")

    async def purge_handoff_lane(self, model: str, lane: str) -> None:
        subject = subjects.handoff(model, lane)
        await self.retry(lambda attempt_s: self.api(f"STREAM.PURGE.{subjects.HANDOFF}", {"filter": subject}, attempt_s),
                         READ_DEADLINE_S, f"purge of {subject}")

    async def private_lanes(self) -> list[tuple[str, str]]:
        """(model, lane) of those in which jobs stand, waiting or being worked on."""
        found = {(model, lane) for model, _, lane in map(subjects.jobs_parts, await self._depths(subjects.JOBS, "jobs.>"))
                 if lane == subjects.LOCAL_LANE or lane.startswith(subjects.WORKER_LANE)}
        return sorted(found)

    async def lane_state(self, model: str, lane: str) -> LaneState:
        """All classes together."""
        infos = [await self._consumer_info(subjects.JOBS, subjects.jobs_consumer(model, klass, lane)) for klass in CLASSES]
        return {"pending": sum(int(info["num_pending"]) for info in infos),
                "ack_pending": sum(int(info["num_ack_pending"]) for info in infos),
                "num_delivered": sum(int(info["delivered"]["consumer_seq"]) for info in infos)}

    async def call_for_relief(self, model: str, lane: str, hops: int = 0) -> None:
        """Ask one worker of the model to take what waits in this lane. Heard by nobody if nobody is there."""
        await self.publish(subjects.relief(model), encode_map({"lane": lane, "hops": hops}))

    # --- chains -------------------------------------------------------------------------------------------------------------

    async def fence(self, subject: str, by: str, deadline_s: float = READ_DEADLINE_S) -> int:
        """Put a tombstone on a chain, unless one stands there: its stream sequence. `by` is "worker.incarnation" of the taker."""
        return await chain.fence(self, subject, by, deadline_s)

    async def read_chain(self, subject_filter: str, start_seq: int = 0, start_time_ms: int | None = None,
                         deadline_s: float = READ_DEADLINE_S) -> list[tuple[str, int, Frame]]:
        """(subject, stream sequence, frame) of all that is stored, in order; wildcards allowed (`out.<origin>.>`)."""
        frames, num_malformed = await chain.read_frames(self, subject_filter, start_seq, start_time_ms, deadline_s)
        self.malformed_frames += num_malformed
        return frames

    # --- results ------------------------------------------------------------------------------------------------------------

    async def put_result(self, record: FinalRecord, deadline_s: float = READ_DEADLINE_S) -> FinalRecord:
        """Store a job's final record unless one is there. Returns the one that stands: ours, or the first writer's."""
        subject, body = subjects.result(record.job_id), record.encode()

        async def attempt(attempt_s: float) -> FinalRecord:
            try:
                await self.store(subject, body, {EXPECTED_LAST: "0"}, attempt_s)
                return record
            except ApiError as error:
                if error.err_code != WRONG_LAST_SEQUENCE:
                    raise
            winner = await self.last_message(subjects.RESULTS, subject, attempt_s)
            if winner is None:
                raise Unavailable(f"{subject}: a record stood there and has just aged out")
            return FinalRecord.decode(winner.data)

        return await self.retry(attempt, deadline_s, f"store of {subject}")

    async def get_result(self, job_id: str, deadline_s: float = READ_DEADLINE_S) -> FinalRecord | None:
        """The job's final record, if it has one (kept for a day). Raises MalformedMessage, Unavailable."""
        stored = await self.retry(lambda attempt_s: self.last_message(subjects.RESULTS, subjects.result(job_id), attempt_s),
                                  deadline_s, f"look-up of the result of {job_id}")
        return None if stored is None else FinalRecord.decode(stored.data)

    # --- dead letters -------------------------------------------------------------------------------------------------------

    async def dead_letter(self, letter: DeadLetter, model: str, deadline_s: float = PUBLISH_DEADLINE_S) -> int:
        """Keep what cannot be served: its sequence in the DLQ. A payload that would not fit is cut, and the reason says so."""
        body = letter.encode()
        excess = len(body) + HEADER_ROOM_BYTES - self.max_message_bytes
        if excess > 0:
            kept = max(0, len(letter.payload) - excess - HEADER_ROOM_BYTES)
            reason = f"{letter.reason[:1000]} (payload of {len(letter.payload)} bytes was cut)"
            letter = replace(letter, payload=letter.payload[:kept], reason=reason)
            body = letter.encode()
        return await self._publish_once(subjects.dead_letter(model), body, hashlib.sha256(body).hexdigest(), deadline_s)

    async def dlq_list(self, model: str, after_seq: int = 0, limit: int = 100) -> list[tuple[int, DeadLetter]]:
        """(sequence, letter), oldest first; the next page starts after the last sequence of this one."""
        stored = await self.read_stream(subjects.DLQ, subjects.dead_letter(model), start_seq=after_seq + 1, limit=limit)
        letters = []
        for message in stored:
            try:
                letters.append((message.seq, DeadLetter.decode(message.data)))
            except MalformedMessage as error:
                logger.warning("DLQ entry %d cannot be read: %s", message.seq, error)
        return letters

    async def dlq_get(self, seq: int) -> DeadLetter | None:
        """Raises MalformedMessage if the entry was not written by dead_letter()."""
        stored = await self._dlq_entry(seq)
        return None if stored is None else DeadLetter.decode(stored.data)

    async def dlq_delete(self, seq: int) -> bool:
        """False if there is no such entry."""
        if await self._dlq_entry(seq) is None:
            return False
        try:
            await self.retry(lambda attempt_s: self.api(f"STREAM.MSG.DELETE.{subjects.DLQ}", {"seq": seq}, attempt_s),
                             READ_DEADLINE_S, f"deletion of DLQ entry {seq}")
        except ApiError:
            return False   # somebody else was faster
        return True

    # --- roster -------------------------------------------------------------------------------------------------------------

    async def roster_add(self, worker: str, incarnation: int, deadline_s: float = PUBLISH_DEADLINE_S) -> None:
        """Write down, where Redis cannot lose it, that this incarnation exists (forgotten after a day: add it again before)."""
        await self._publish_once(subjects.roster(worker, incarnation), encode_map({}), uuid.uuid4().hex, deadline_s)

    async def roster(self) -> list[tuple[str, int]]:
        """(worker, incarnation) of all that were added in the last day, sorted."""
        names = await self._depths(subjects.ROSTER, "roster.>")
        entries = (subject.split(".") for subject in names)
        return sorted((parts[1], int(parts[2])) for parts in entries if len(parts) == 3 and parts[2].isdigit())

    # --- inside -------------------------------------------------------------------------------------------------------------

    async def _publish_once(self, subject: str, body: bytes, message_id: str, deadline_s: float) -> int:
        try:
            return await self.retry(lambda attempt_s: self.store(subject, body, {MESSAGE_ID: message_id}, attempt_s),
                                    deadline_s, f"publish to {subject}")
        except ApiError as error:
            if error.err_code == TOO_MANY_MESSAGES:
                raise QueueFull(subject) from None
            raise

    async def _dlq_entry(self, seq: int) -> StoredMessage | None:
        return await self.retry(lambda attempt_s: self.message_at(subjects.DLQ, seq, attempt_s),
                                READ_DEADLINE_S, f"look-up of DLQ entry {seq}")

    async def _consumer_info(self, stream: str, consumer: str) -> dict[str, Any]:
        return await self.retry(lambda attempt_s: self.api(f"CONSUMER.INFO.{stream}.{consumer}", timeout_s=attempt_s),
                                READ_DEADLINE_S, f"state of consumer {consumer}")

    async def _consumer_infos(self, stream: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            query = {"offset": len(found)}
            page = await self.retry(lambda attempt_s, q=query: self.api(f"CONSUMER.LIST.{stream}", q, attempt_s),  # type: ignore[misc]
                                    READ_DEADLINE_S, f"consumers of stream {stream}")
            found += page.get("consumers") or []
            if not page.get("consumers") or len(found) >= page.get("total", 0):
                return found

    async def _depths(self, stream: str, subject_filter: str) -> dict[str, int]:
        """Messages per subject."""
        depths: dict[str, int] = {}
        while True:
            query = {"subjects_filter": subject_filter, "offset": len(depths)}
            info = await self.retry(lambda attempt_s, q=query: self.api(f"STREAM.INFO.{stream}", q, attempt_s),  # type: ignore[misc]
                                    READ_DEADLINE_S, f"state of stream {stream}")
            page = info["state"].get("subjects") or {}
            depths.update(page)
            if not page or len(depths) >= info.get("total", 0):
                return depths
