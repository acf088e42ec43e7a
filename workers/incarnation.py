"""One life of a worker in the farm: registered, pulling, owning jobs, until it leaves or learns that others took its jobs.

The engine outlives it: a worker that was taken for dead registers anew without loading weights again.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from coordinator import subjects
from coordinator.bus import Bus, Message
from coordinator.errors import Fenced, Unavailable
from coordinator.prefix_index import PrefixIndex
from coordinator.store import Blame, Store
from coordinator.subjects import model_token
from coordinator.tasks import end
from coordinator.tokenizer import Tokenizer
from workers import mps
from workers.active_job import Phase
from workers.emitter import Emitter
from workers.engine_link import EngineCommands
from workers.engine_messages import Blocks, Event, Failed, Imported, Pinned, Ready, Stats, TellBlocks, Tokens
from workers.handover import Giver, Taker
from workers.intake import Intake
from workers.jobs import Identity, Jobs
from workers.lease import Lease
from workers.prefix_teller import PrefixTeller
from workers.pulling import Pulling, handoff_consumers, job_consumers, lane_consumers
from workers.recent import RecentIds
from workers.relief import Relief
from workers.room import Room
from workers.settings import WorkerSettings
from workers.step_clock import StepClock

log = logging.getLogger(__name__)

BEAT_S = subjects.ACK_WAIT_S / 3
DEADLINE_CHECK_S = 0.1
MAX_REMEMBERED_CANCELS = 100_000
ROSTER_PERIOD_S = subjects.ROSTER_MAX_AGE_S / 24
SETTLE_S = 2.0


class Incarnation:
    """Use: `await start(…)`, feed `on_event`, wait for `over`, `await leave(…)`."""

    def __init__(self, settings: WorkerSettings, ready: Ready, stats: Stats, engine: EngineCommands, tokenizer: Tokenizer, bus: Bus,
                 store: Store) -> None:
        self.over = asyncio.Event()     # others took over: nothing of this life may be used any more
        self.stats = stats
        self._standing_tokens = 0       # the least that was pending since the last renewal: what comes and goes is no backlog
        self._settings = settings
        self._ready = ready
        self._engine = engine
        self._tokenizer = tokenizer
        self._bus = bus
        self._store = store
        self._cancelled = RecentIds(MAX_REMEMBERED_CANCELS)
        self.mps = str(mps.daemon_folder() or "") if ready.device.startswith("cuda") else ""
        self._model = model_token(settings.engine.model_name)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._clock = StepClock()

    async def start(self) -> None:
        """Register, then pull. Raises Unavailable when NATS or Redis does not answer."""
        settings, ready = self._settings, self._ready
        # What may fail comes before the lease, which is renewed from its start on.
        for lane in self._lanes:
            await self._bus.ensure_lane(self._model, lane)
        for lane in self._handoff_lanes:
            await self._bus.ensure_handoff_lane(self._model, lane)
        incarnation, floor_era = await self._store.register(settings.worker_id, self._info())
        if floor_era:
            await self._store.set_floor(floor_era, await self._bus.last_job_seq())
        self.me = me = Identity(worker=settings.worker_id, incarnation=incarnation, role=settings.engine.role, model=self._model,
                                host=self._host, layout=ready.layout)
        await self._bus.roster_add(me.worker, me.incarnation)  # before the first claim: docs/protocol.md, emptied Redis
        self.jobs = Jobs(me, self._bus, self._store, self._engine)
        self.jobs.emitter = Emitter(self._bus, me.worker, me.incarnation, on_stored=self.jobs.on_stored, on_fenced=self._on_fenced)
        self._lease = Lease(self._store, me.owner, self._info, self.jobs.owned, self._on_lost, self.over.set)
        self._lease.start()
        self._cancels = await self._bus.subscribe("cancel.*", self._on_cancel)
        own_lanes = [lane for lane in self._lanes if lane != subjects.LOCAL_LANE]
        self._relief: Relief | None = None
        self._teller: PrefixTeller | None = None
        if settings.prefix_affinity:
            index = PrefixIndex(self._store, self._model)
            self._teller = PrefixTeller(index, incarnation, lambda: self._engine.send(TellBlocks()))
            self._teller.start()
        self._giver: Giver | None = None
        self._taker: Taker | None = None
        if me.role == "prefill":
            self._giver = Giver(me, ready.pool, self._bus, self._store, self._engine, self.jobs)
            await self._giver.start(prefers_host=settings.handoff_same_host)
        intake = Intake(me, self._tokenizer, self._bus, self._store, self.jobs, self._cancelled.__contains__)
        room = Room(self.jobs, ready, lambda: self._lease.is_fresh, lambda: self.stats)

        def job_pulling(classes: list[list[str]]) -> Pulling:
            return Pulling(self._bus, classes, room=room.for_jobs, room_for_last=room.for_background_jobs, num_slots=ready.max_num_seqs,
                           handle=intake.accept)

        if me.role == "decode":
            self._taker = Taker(me, self._tokenizer, self._bus, self._store, self._engine, self.jobs, self._cancelled.__contains__,
                                settings.engine.kv_transfer)
            self._pullings = [Pulling(self._bus, handoff_consumers(self._model, self._handoff_lanes), room=room.for_handles,
                                      room_for_last=room.for_background_handles, num_slots=ready.max_num_seqs, handle=self._taker.take)]
            if self._lanes:
                self._pullings.append(job_pulling(lane_consumers(self._model, self._lanes)))
        else:
            pulling = job_pulling(job_consumers(self._model, own_lanes))
            self._pullings = [pulling]
            self._relief = Relief(self._bus, self._model, "".join(own_lanes), room.for_jobs, pulling.take_from)
        self.jobs.on_change = self._on_room
        for each in self._pullings:
            await each.start()
        if self._relief is not None:
            await self._relief.start()
        self._tasks = [asyncio.create_task(self._beat_forever()), asyncio.create_task(self._stay_on_roster()),
                       asyncio.create_task(self._watch_deadlines())]

    def _info(self) -> dict[str, Any]:
        engine, stats, layout = self._settings.engine, self.stats, self._ready.layout
        standing_tokens, self._standing_tokens = self._standing_tokens, stats.pending_tokens
        return {"role": engine.role, "engine": engine.engine, "model": self._model, "host": self._host, "pid": os.getpid(),
                "device": self._ready.device, "kv_transfer": engine.kv_transfer, "mps": self.mps,
                "state": "draining" if self._is_draining else "serving", "step_s": round(self._clock.step_s, 4),
                "layout": {name: getattr(layout, name) for name in layout.__slots__},
                "stats": {name: getattr(stats, name) for name in stats.__slots__},
                "lanes": self._lanes, "handoff_lanes": self._handoff_lanes, "standing_tokens": standing_tokens,
                "max_num_seqs": self._ready.max_num_seqs,
                "max_total_tokens": self._ready.max_total_tokens, "max_seq_len": self._ready.max_seq_len,
                "finished": self.jobs.num_finished if hasattr(self, "jobs") else 0,
                "group": asdict(self._ready.group) if self._ready.group else None}

    @property
    def _host(self) -> str:
        return self._settings.host or socket.gethostname()

    @property
    def _handoff_lanes(self) -> list[str]:
        """Lanes of HANDOFF that not every decode worker serves."""
        settings = self._settings
        return [subjects.host_lane(self._host)] if settings.handoff_same_host and settings.engine.role == "decode" else []

    @property
    def _lanes(self) -> list[str]:
        """Those that not every worker serves."""
        settings = self._settings
        own = [subjects.worker_lane(settings.worker_id)] if settings.prefix_affinity else []
        return [*own, subjects.LOCAL_LANE] if settings.serves_local and settings.engine.role == "decode" else own

    def _on_room(self) -> None:
        for pulling in self._pullings:
            pulling.on_change()

    # ---- events ----

    def on_event(self, event: Event) -> None:
        match event:
            case Tokens():
                # Of a prefill worker no sequence goes on: its first token is its last one there.
                self._clock.tick(self.me.role != "prefill" and any(row.finish is None for row in event.rows))
                self.jobs.on_tokens(event)
            case Stats():
                self.stats = event
                self._standing_tokens = min(self._standing_tokens, event.pending_tokens)
                self.jobs.on_change()
            case Blocks() if self._teller is not None:
                self._teller.on_blocks(event)
            case Pinned() if self._giver is not None:
                self._giver.on_pinned(event)
            case Imported() if self._taker is not None:
                self._taker.on_imported(event)
            case Failed() if self._taker is None or not self._taker.on_failed(event):
                self.jobs.on_failed(event)

    async def _on_cancel(self, message: Message) -> None:
        job_id = message.subject.partition(".")[2]
        active = self.jobs.get(job_id)
        if active is None:
            self._cancelled.add(job_id)
            return
        active.is_cancelled = True
        await self._end_early(job_id, "cancelled")

    async def _end_early(self, job_id: str, reason: str) -> None:
        """End a job that is ours, in whatever phase; one that is being handed over ends with whoever wins it."""
        active = self.jobs.get(job_id)
        if active is None:
            return
        if active.phase is Phase.RUNNING:
            self.jobs.end(active, reason)
        elif active.phase is Phase.OFFERED and self._giver is not None:
            with contextlib.suppress(Unavailable):  # the deadline watch or the taker comes back to it
                if await self._giver.take_back(active):
                    self.jobs.end(active, reason)

    def _on_fenced(self, fenced: Fenced) -> None:
        log.warning("%s", fenced)
        self.over.set()

    def _on_lost(self, job_ids: set[str]) -> None:
        for job_id in job_ids:
            if (active := self.jobs.get(job_id)) is not None:
                self.jobs.forget(active)

    # ---- periodic ----

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for active in self.jobs.all():
                if active.phase not in (Phase.IMPORTING, Phase.CLAIMING):
                    with contextlib.suppress(Unavailable):
                        await self._bus.progress(active.ack_subject)

    async def _stay_on_roster(self) -> None:
        while True:
            await asyncio.sleep(ROSTER_PERIOD_S)
            with contextlib.suppress(Unavailable):
                await self._bus.roster_add(self.me.worker, self.me.incarnation)

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(DEADLINE_CHECK_S)
            now_ms = time.time() * 1000
            for active in self.jobs.all():
                if active.is_cancelled and active.phase in (Phase.OFFERED, Phase.RUNNING):
                    await self._end_early(active.job.job_id, "cancelled")
                elif active.job.deadline_ms is not None and now_ms > active.job.deadline_ms:
                    await self._end_early(active.job.job_id, "expired")

    # ---- leaving ----

    async def stop_pulling(self) -> None:
        self._is_draining = True
        if self._relief is not None:
            await self._relief.close()
            self._relief = None
        for pulling in self._pullings:
            await pulling.close()
        await self._lease.renew_now()

    async def drain(self, timeout_s: float, has_failed: Callable[[], bool] = lambda: False) -> None:
        """Take nothing new and let what is here end by itself, for a while; with an engine that `has_failed` nothing does."""
        give_up_at = time.monotonic() + timeout_s
        while len(self.jobs) and time.monotonic() < give_up_at and not self.over.is_set() and not has_failed():
            await asyncio.sleep(0.02)

    async def leave(self, blame: Blame = "") -> None:
        """Hand back what is still ours, and retire. What others took stays theirs. `blame`: what happened to the engine, if it ended."""
        await self.stop_pulling()
        if self._teller is not None:
            await self._teller.close()
        if self._taker is not None:
            self._taker.abandon()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(pulling.settle() for pulling in self._pullings)), SETTLE_S)
        await end(self._tasks)
        await self._cancels.close()
        if self._giver is not None:
            await self._giver.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.jobs.settle(), SETTLE_S)
        with contextlib.suppress(Unavailable, asyncio.TimeoutError):
            await asyncio.wait_for(self.jobs.hand_back(blame), SETTLE_S)
        await self.jobs.emitter.close()
        await self._lease.close()
        with contextlib.suppress(Unavailable):
            await self._store.retire(self.me.owner)
