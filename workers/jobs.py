"""The jobs of one worker incarnation, from claim to commit or hand-over. Every path by which a job leaves goes through here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from coordinator.bus import Bus
from coordinator.errors import Unavailable
from coordinator.messages import KVLayout, TokenRun, pack_ids
from coordinator.store import Blame, OwnedJob, Store, owner_name
from workers.active_job import ActiveJob, Phase
from workers.emitter import Emitter
from workers.engine_link import EngineCommands
from workers.engine_messages import AddSequence, Cancel, Failed, Pinned, TokenRow, Tokens

log = logging.getLogger(__name__)

RETRY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this incarnation is, to everybody else."""

    worker: str
    incarnation: int
    role: str
    model: str
    host: str
    layout: KVLayout

    @property
    def owner(self) -> str:
        return owner_name(self.worker, self.incarnation)


class Jobs:
    """Start, feed, end and forget jobs.

    `on_offerable` is told when a running job of role prefill may be offered, `on_pinned` what the engine pinned while its claim was asked
    for, `on_change` when capacity may have changed.
    """

    def __init__(self, me: Identity, bus: Bus, store: Store, engine: EngineCommands) -> None:
        self.me = me
        self.on_offerable: Callable[[ActiveJob], None] = lambda active: None
        self.on_change: Callable[[], None] = lambda: None
        self.on_pinned: Callable[[Pinned], None] = lambda pinned: None
        self.emitter: Emitter
        self.num_finished = 0
        self.num_asserts = 0        # a claim or take from before the last one is void
        self._bus = bus
        self._store = store
        self._engine = engine
        self._active: dict[str, ActiveJob] = {}
        self._by_key: dict[str, ActiveJob] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects: list[ActiveJob] = []        # claimed, waiting until they may run as the only suspect
        self._on_trial: ActiveJob | None = None

    def __len__(self) -> int:
        return len(self._active)

    def get(self, job_id: str) -> ActiveJob | None:
        return self._active.get(job_id)

    def all(self) -> list[ActiveJob]:
        return list(self._active.values())

    def num_in(self, *phases: Phase, background: bool = True) -> int:
        """Jobs in one of these phases; without `background` only those that give way to nobody."""
        return sum(1 for active in self._active.values() if active.phase in phases and (background or not active.is_background))

    def num_waiting_tokens(self, *, background: bool = True) -> int:
        """Prompt tokens that were given to the engine and have not produced a token yet."""
        return sum(len(a.prompt_ids) for a in self._active.values()
                   if a.phase is Phase.RUNNING and a.num_output == a.num_stored == 0 and (background or not a.is_background))

    def owned(self) -> list[OwnedJob]:
        """What to assert after Redis lost data: what we emit for or commit. The rest is dropped: somebody else may own it by now."""
        self.num_asserts += 1
        for active in self.all():
            if active.phase in (Phase.OFFERED, Phase.IMPORTING, Phase.CLAIMING):
                self.forget(active)
            active.is_swept = False
        # A job with its final record is over: asserted, nothing would ever take its claim away again.
        return [OwnedJob(job_id=a.job.job_id, epoch=a.epoch, ack=a.ack_subject, origin=a.job.origin, model=a.job.model, chains=a.chains)
                for a in self._active.values() if not a.has_record]

    def add(self, active: ActiveJob) -> None:
        former = self._active.get(active.job.job_id)
        if former is not None:
            self.forget(former)
        self._active[active.job.job_id] = active
        self._by_key[active.key] = active

    def start(self, active: ActiveJob) -> None:
        """Give a claimed job to the engine."""
        self.add(active)
        self._run(active)

    def start_early(self, active: ActiveJob) -> None:
        """Give the engine a job while its claim is being asked for; `confirm` or `forget` follows."""
        active.phase = Phase.CLAIMING
        self.start(active)

    def confirm(self, active: ActiveJob, epoch: int) -> None:
        """The claim stands: what the engine said meanwhile counts."""
        active.epoch = epoch
        active.phase = Phase.RUNNING
        early, active.early = active.early, []
        for event in early:
            match event:
                case TokenRow():
                    self._on_row(active, event)
                case Pinned():
                    self.on_pinned(event)
                case Failed():
                    self.on_failed(event)

    def start_trial(self, active: ActiveJob) -> None:
        """Give a suspect to the engine when no other suspect runs here."""
        self.add(active)
        self._suspects.append(active)
        self._try_next_suspect()

    def _try_next_suspect(self) -> None:
        if self._on_trial is not None and self._on_trial.phase is not Phase.GONE:
            return
        self._on_trial = None
        self._suspects = [suspect for suspect in self._suspects if suspect.phase is Phase.RUNNING]
        if self._suspects:
            self._on_trial = self._suspects.pop(0)
            self._spawn(self._try(self._on_trial))

    async def _try(self, active: ActiveJob) -> None:
        await self.until_available(lambda: self._store.put_on_trial(self.me.owner, active.job.job_id, active.epoch))
        if active.phase is Phase.RUNNING:
            self._run(active)

    def _run(self, active: ActiveJob) -> None:
        self._engine.send(AddSequence(job_id=active.key, token_ids=pack_ids([*active.prompt_ids, *active.shown.token_ids]),
                                      num_prompt=len(active.prompt_ids), params=active.job.params, is_background=active.is_background))

    def forget(self, active: ActiveJob) -> None:
        """Drop all that this worker holds of a job; what is not stored stays unsaid."""
        active.phase = Phase.GONE
        active.pending.clear()
        if self._by_key.pop(active.key, None) is not None:
            self._engine.send(Cancel(job_id=active.key))
        if self._active.get(active.job.job_id) is active:
            del self._active[active.job.job_id]
        if active is self._on_trial:
            self._try_next_suspect()
        self.on_change()

    def end(self, active: ActiveJob, reason: str, error: str = "") -> None:
        """End a job that is ours without another token (cancelled, expired, failed)."""
        if active.phase in (Phase.FINISHING, Phase.GONE):
            return
        active.end(self.me.owner, reason, error)
        self._send_last(active)

    def repair(self, active: ActiveJob) -> None:
        """A job whose last frame a former owner stored before it died: only the commit is left to do."""
        active.phase = Phase.FINISHING
        self._spawn(self._commit(active))

    # ---- from the engine ----

    def on_tokens(self, tokens: Tokens) -> None:
        for key, cached_tokens in tokens.prefilled:
            if (active := self._by_key.get(key)) is not None:
                active.cached_tokens = cached_tokens
        for row in tokens.rows:
            active = self._by_key.get(row.job_id)
            if active is not None and active.phase is Phase.RUNNING:
                self._on_row(active, row)
            elif active is not None and active.phase is Phase.CLAIMING:
                active.early.append(row)

    def _on_row(self, active: ActiveJob, row: TokenRow) -> None:
        if active.phase is not Phase.RUNNING:
            return  # an earlier row ended it
        if active.push(self.me.owner, row.token_id, row.logprob, row.finish, row.top_logprobs):
            self._send_last(active)
        else:
            self.emitter.wake(active)

    def on_failed(self, failed: Failed) -> None:
        active = self._by_key.get(failed.job_id)
        if active is not None and active.phase is Phase.CLAIMING:
            active.early.append(failed)
        elif active is not None:
            self.end(active, "error", f"{failed.field}: {failed.error}" if failed.field else failed.error)

    def by_key(self, key: str) -> ActiveJob | None:
        return self._by_key.get(key)

    # ---- from the chain ----

    def on_stored(self, active: ActiveJob, run: TokenRun) -> None:
        if run.finish is not None:
            self._spawn(self._commit(active))
        elif active.phase is Phase.RUNNING:
            self.on_offerable(active)

    def _send_last(self, active: ActiveJob) -> None:
        active.phase = Phase.FINISHING
        self._engine.send(Cancel(job_id=active.key))
        self.emitter.wake(active)

    async def _commit(self, active: ActiveJob) -> None:
        """The last frame stands on the chain: final record, then acknowledge, then done. Each step may be repeated by anyone."""
        record = active.record()
        await self.until_available(lambda: self._bus.put_result(record))
        active.has_record = True
        # `done` before the acknowledgement: a crash in between leaves a message, and that brings somebody who cleans up.
        await self.until_available(lambda: self._store.finish(self.me.owner, active.job.job_id))
        await self.until_available(lambda: self._bus.ack(active.ack_subject))
        self.num_finished += 1
        self.forget(active)

    async def until_available(self, call: Callable[[], Awaitable[object]]) -> None:
        """Repeat an idempotent call until the server it needs is back."""
        while True:
            try:
                await call()
                return
            except Unavailable as error:
                log.warning("waiting: %s", error)
                await asyncio.sleep(RETRY_S)

    async def hand_back(self, blame: Blame = "") -> None:
        """Put every job that is still ours back into the queue: nothing of it is emitted here any more.

        `blame`: what happened to the engine, if that is why. Only jobs that the engine had are blamed.
        """
        held = [active for active in self.all() if active.phase in (Phase.RUNNING, Phase.OFFERED)]
        was_offered = {active.job.job_id for active in held if active.phase is Phase.OFFERED}
        for active in held:
            self.forget(active)
        await self.emitter.flush()
        for active in held:
            try:
                if active.job.job_id in was_offered:
                    epoch = await self._store.take_back(self.me.owner, active.job.job_id, active.epoch)
                    if epoch is None:
                        continue
                    active.epoch = epoch
                await self._give_up(active, "" if active.job.job_id in was_offered or active in self._suspects else blame)
            except Unavailable as error:  # this one comes back by itself, once nobody beats for it
                log.warning("job %s: not handed back: %s", active.job.job_id, error)

    async def put_back(self, active: ActiveJob) -> None:
        """One job back into the queue, for another owner to go on with."""
        self.forget(active)
        await self.emitter.flush()
        await self._give_up(active)

    async def _give_up(self, active: ActiveJob, blame: Blame = "") -> None:
        if await self._store.give_up(self.me.owner, active.job.job_id, active.epoch, blame):
            await self._bus.nak(active.ack_subject)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for the commits under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
