"""Hand a sequence's KV cache from a prefill worker to a decode worker (docs/protocol.md, hand-over).

Giver: pages pinned, first token stored -> handle into HANDOFF -> answers `confirm` while the pin stands -> unpins on `release`.
Taker: pulls a handle (pulling is the reservation) -> copies pages -> asks the giver to confirm -> takes ownership by compare-and-set
-> acknowledges the handle -> tells the giver -> decodes. Whatever fails before the compare-and-set costs time, never an answer.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine

from coordinator import subjects
from coordinator.bus import Bus, Delivery, Message
from coordinator.errors import InvalidField, MalformedMessage, Unavailable, Unreachable
from coordinator.fold import Shown
from coordinator.host_identity import host_identity
from coordinator.messages import (
    DeadLetter,
    Job,
    KVHandle,
    KVSource,
    TopLogprobs,
    check_id,
    decode_map,
    encode_map,
    pack_floats,
    pack_ids,
    pack_tops,
    unpack_floats,
    unpack_ids,
    unpack_tops,
)
from coordinator.store import LeaseLapsed, Store, owner_name
from coordinator.tasks import end
from coordinator.tokenizer import Tokenizer
from workers.active_job import ActiveJob, Phase, open_job
from workers.engine_link import EngineCommands
from workers.engine_messages import Activate, Failed, Imported, ImportSequence, Pinned, PoolAddress, ReleasePin
from workers.host_lane import HostLane
from workers.jobs import Identity, Jobs
from workers.transfer.reach import AUTO, ways_to

log = logging.getLogger(__name__)

HANDLE_LEASE_S = 60.0        # an offer nobody took in this time is made again, under a new epoch
RECONCILE_S = 1.0            # how often a giver looks whether a taker's `release` was lost
CONFIRM_TIMEOUT_S = 1.0
RETRY_DELAY_S = 0.5


class Giver:
    """The prefill side."""

    def __init__(self, me: Identity, pool: PoolAddress, bus: Bus, store: Store, engine: EngineCommands, jobs: Jobs) -> None:
        self._me = me
        self._pool = pool
        self._bus = bus
        self._store = store
        self._engine = engine
        self._jobs = jobs
        self._host_lane = HostLane(bus, store, me.model, me.host)
        self._tasks: set[asyncio.Task[None]] = set()
        jobs.on_offerable = self.maybe_offer
        jobs.on_pinned = self.on_pinned

    async def start(self, *, prefers_host: bool = True) -> None:
        self._requests = await self._bus.subscribe(subjects.kv(self._me.worker, self._me.incarnation), self._on_request)
        self._spawn(self._reconcile_forever())
        if prefers_host:
            self._host_lane.start()

    def on_pinned(self, pinned: Pinned) -> None:
        active = self._jobs.by_key(pinned.job_id)
        if active is not None and active.phase is Phase.CLAIMING:
            active.early.append(pinned)
            return
        if active is None or active.phase is not Phase.RUNNING:
            return  # ended meanwhile: its Cancel is on the way to the engine
        active.generation = pinned.generation
        active.offered_pages = pinned.page_ids
        active.num_pinned_tokens = pinned.num_tokens
        self.maybe_offer(active)

    def maybe_offer(self, active: ActiveJob) -> None:
        """Offer once the pages are pinned and every token so far is stored: a reader must never miss what a taker will not repeat."""
        if active.phase is Phase.RUNNING and active.generation >= 0 and active.num_stored == active.num_output:
            if not active.is_swept:
                self._spawn(self._put_back(active))  # its next owner looks for all former ones first
                return
            active.phase = Phase.OFFERED
            active.offered_at = time.monotonic()
            self._spawn(self._publish(active))
            self._jobs.on_change()

    async def _put_back(self, active: ActiveJob) -> None:
        with contextlib.suppress(Unavailable):  # then its lease brings it back
            await self._jobs.put_back(active)

    async def _publish(self, active: ActiveJob) -> None:
        handle = self._handle(active).encode()
        await self._jobs.until_available(lambda: self._host_lane.publish(active, handle))

    def _handle(self, active: ActiveJob) -> KVHandle:
        shown = active.shown
        return KVHandle(
            job=active.job.encode(), epoch=active.epoch, layout=self._me.layout, num_tokens=active.num_pinned_tokens,
            source=KVSource(worker=self._me.worker, incarnation=self._me.incarnation, host=host_identity(),
                            ranks=self._pool.ranks, num_pages=self._pool.num_pages),
            page_ids=active.offered_pages, generation=active.generation, prompt_ids=pack_ids(active.prompt_ids),
            output=pack_ids(shown.token_ids), logprobs=pack_floats(shown.logprobs), texts=tuple(shown.texts),
            cached_tokens=active.cached_tokens, ack_subject=active.ack_subject, chains=active.chains, emitters=tuple(shown.emitters),
            lease_expires_ms=int((time.time() + HANDLE_LEASE_S) * 1000),
            top_logprobs=pack_tops(shown.top_logprobs))

    async def _on_request(self, message: Message) -> None:
        """`confirm`: does this pin still stand? `release`: the taker owns the job now. Malformed requests are answered with no."""
        try:
            body = decode_map(message.data)
            op, job_id, epoch, generation = body["op"], body["job_id"], body["epoch"], body["generation"]
        except (MalformedMessage, KeyError) as error:
            log.warning("kv request refused: %s", error)
            await self._answer(message, False)
            return
        active = self._jobs.get(job_id) if isinstance(job_id, str) else None
        is_pinned = (active is not None and active.phase is Phase.OFFERED and active.epoch == epoch and active.generation == generation)
        if op == "release" and is_pinned:
            assert active is not None
            self._release(active)
        await self._answer(message, is_pinned)

    async def _answer(self, message: Message, is_ok: bool) -> None:
        if message.reply:
            await self._bus.publish(message.reply, encode_map({"ok": is_ok}))

    def _release(self, active: ActiveJob) -> None:
        self._host_lane.forget(active)
        self._engine.send(ReleasePin(job_id=active.key))
        self._jobs.forget(active)

    async def _reconcile_forever(self) -> None:
        while True:
            await asyncio.sleep(RECONCILE_S)
            now = time.monotonic()
            self._host_lane.keep({active.key for active in self._jobs.all()})
            for active in self._jobs.all():
                if active.phase is Phase.OFFERED and now - active.offered_at > RECONCILE_S:
                    try:
                        await self._reconcile(active, now)
                    except Unavailable as error:
                        log.warning("job %s: offer not checked: %s", active.job.job_id, error)
                        break

    async def _reconcile(self, active: ActiveJob, now: float) -> None:
        record = await self._store.job(active.job.job_id)
        if active.phase is not Phase.OFFERED:
            return
        if record and record.get("owner") != self._me.owner:
            self._release(active)
        elif (now - active.offered_at > HANDLE_LEASE_S or self._host_lane.is_overdue(active)) and await self.take_back(active):
            active.offered_at = now
            await self._host_lane.withdraw(active)
            await self._publish(active)

    async def take_back(self, active: ActiveJob) -> bool:
        """Void the handle that is out. False: a taker was faster, the pages are released."""
        epoch = await self._store.take_back(self._me.owner, active.job.job_id, active.epoch)
        if active.phase is not Phase.OFFERED:
            return False
        if epoch is None:
            self._release(active)
            return False
        active.epoch = max(active.epoch, epoch)  # two calls may be under way: a cancellation beside the end of a handle's time
        return True

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await self._requests.close()
        await self._host_lane.close()
        await end(self._tasks)


class Taker:
    """The decode side."""

    def __init__(self, me: Identity, tokenizer: Tokenizer, bus: Bus, store: Store, engine: EngineCommands, jobs: Jobs,
                 is_cancelled: Callable[[str], bool], kv_transfer: str = AUTO) -> None:
        self._me = me
        self._kv_transfer = kv_transfer
        self._tokenizer = tokenizer
        self._bus = bus
        self._store = store
        self._engine = engine
        self._jobs = jobs
        self._is_cancelled = is_cancelled
        self._imports: dict[str, asyncio.Future[Imported | Failed]] = {}

    def on_imported(self, imported: Imported) -> None:
        self._arrived(imported.job_id, imported)

    def on_failed(self, failed: Failed) -> bool:
        """The engine can never run this import. False: it is no import."""
        return self._arrived(failed.job_id, failed)

    def _arrived(self, key: str, outcome: Imported | Failed) -> bool:
        waiting = self._imports.get(key)
        if waiting is not None and not waiting.done():
            waiting.set_result(outcome)
        return waiting is not None

    def abandon(self) -> None:
        """We are leaving: handles whose pages are still on the way go to another worker."""
        for waiting in self._imports.values():
            if not waiting.done():
                waiting.set_exception(Unavailable("this worker is leaving"))

    async def take(self, delivery: Delivery) -> None:
        """One handle from pull to decode. Leaves the delivery acknowledged, or put back for another worker."""
        try:
            handle = KVHandle.decode(delivery.data)
            check_id("source", handle.source.worker)
            active = self._open(Job.decode(handle.job), handle)
        except (MalformedMessage, InvalidField) as error:
            await self._bus.dead_letter(DeadLetter(subject=delivery.subject, reason=f"KV handle: {error}", payload=delivery.data,
                                                   at_ms=int(time.time() * 1000)), self._me.model)
            await delivery.ack()
            return
        try:
            await self._take_up(active, handle, delivery)
        except Unavailable as error:
            log.warning("job %s: handle put back: %s", active.job.job_id, error)
            if self._jobs.get(active.job.job_id) is active:
                self._jobs.forget(active)
            await delivery.nak(RETRY_DELAY_S)

    async def _take_up(self, active: ActiveJob, handle: KVHandle, delivery: Delivery) -> None:
        job_id = active.job.job_id
        if (why := self._refusal(handle)) is not None:
            log.error("job %s: %s", job_id, why)
            await self._put_back(handle, job_id, delivery)
            return
        while (former := self._jobs.get(job_id)) is not None:
            if former.epoch > handle.epoch:
                if former.phase is not Phase.IMPORTING:  # else the first copy may yet have to go back
                    await delivery.ack()
                return
            if await self._is_void(handle, job_id):
                await delivery.ack()
                return
            if self._jobs.get(job_id) is former:
                self._jobs.forget(former)
        self._jobs.add(active)
        try:
            await self._import(active, handle, delivery)
        finally:
            self._imports.pop(active.key, None)

    def _refusal(self, handle: KVHandle) -> str | None:
        """Why this handle must not be used here: using it could give a wrong answer. None: it may."""
        for name in ("model", "weights", "kind", "num_layers", "row", "dtype", "page_size", "num_kv_heads"):
            ours, theirs = getattr(self._me.layout, name), getattr(handle.layout, name)
            if ours != theirs:
                return f"KV layout differs in {name}: ours {ours!r}, {handle.source.worker} has {theirs!r}"
        if self._me.layout.kind == "mock":
            return None   # pages that hold nothing move anywhere
        try:
            ways_to(handle.source, host_identity(), self._kv_transfer)
        except Unreachable as error:
            return str(error)
        return None

    def _open(self, job: Job, handle: KVHandle) -> ActiveJob:
        shown = Shown(token_ids=unpack_ids(handle.output), logprobs=unpack_floats(handle.logprobs), texts=list(handle.texts),
                      emitters=list(handle.emitters), epoch=handle.epoch, top_logprobs=_tops_of(handle))
        if not len(shown.token_ids) == len(shown.logprobs) == len(shown.texts):
            raise MalformedMessage("KV handle: output, logprobs and texts differ in length")
        active = open_job(self._tokenizer, job, epoch=handle.epoch + 1, ack_subject=handle.ack_subject,
                          chains=(*handle.chains, self._me.owner), prompt_ids=unpack_ids(handle.prompt_ids), shown=shown)
        active.phase = Phase.IMPORTING
        active.cached_tokens = handle.cached_tokens
        return active

    async def _import(self, active: ActiveJob, handle: KVHandle, delivery: Delivery) -> None:
        source = handle.source
        ways = ways_to(source, host_identity(), self._kv_transfer)
        arrived = self._imports[active.key] = asyncio.get_running_loop().create_future()
        self._engine.send(ImportSequence(
            job_id=active.key, token_ids=pack_ids([*active.prompt_ids, *active.shown.token_ids]), num_prompt=len(active.prompt_ids),
            params=active.job.params, num_kv_tokens=handle.num_tokens, page_ids=handle.page_ids, layout=handle.layout,
            is_background=active.is_background, source=PoolAddress(ranks=ways, num_pages=source.num_pages)))
        outcome = await arrived
        question = {"job_id": active.job.job_id, "epoch": handle.epoch, "generation": handle.generation}
        if isinstance(outcome, Imported):
            is_confirmed = await self._confirm(source, question) if outcome.ok else None
            if not is_confirmed:
                log.info("job %s: handle not used: %s", active.job.job_id, outcome.error or "not confirmed by its source")
                self._jobs.forget(active)
                if is_confirmed is False:
                    await delivery.ack()
                else:  # nobody said that the pages are gone: the broker may have been away, or the giver slow
                    await self._put_back(handle, active.job.job_id, delivery)
                return
        taken, was_cancelled = await self._take(active.job.job_id, handle.epoch, owner_name(source.worker, source.incarnation))
        if not taken or active.phase is not Phase.IMPORTING:
            if taken:  # it was dropped here meanwhile (Redis had lost data): nobody would decode it
                await self._jobs.until_available(lambda: self._jobs.put_back(active))
            self._jobs.forget(active)
            await delivery.ack()
            return
        active.phase = Phase.RUNNING
        if was_cancelled or active.is_cancelled or self._is_cancelled(active.job.job_id):
            self._jobs.end(active, "cancelled")
        elif isinstance(outcome, Failed):
            self._jobs.end(active, "error", f"{outcome.field}: {outcome.error}" if outcome.field else outcome.error)
        else:
            self._engine.send(Activate(job_id=active.key))
        await delivery.ack()
        await self._bus.publish(subjects.kv(source.worker, source.incarnation), encode_map({"op": "release", **question}))

    async def _take(self, job_id: str, epoch: int, giver: str) -> tuple[bool, bool]:
        """Asked until answered: an attempt whose reply was lost may have made us the owner, and then nobody else would ever decode."""
        while True:
            try:
                return await self._store.take(job_id, epoch, giver=giver, taker=self._me.owner)
            except LeaseLapsed:
                raise  # an earlier attempt did not make us the owner either
            except Unavailable as error:
                log.warning("job %s: not taken yet: %s", job_id, error)
                await asyncio.sleep(RETRY_DELAY_S)

    async def _put_back(self, handle: KVHandle, job_id: str, delivery: Delivery) -> None:
        """For another worker, or another time; a handle that nobody can take any more ends here."""
        if await self._is_void(handle, job_id):
            await delivery.ack()
        else:
            await delivery.nak(RETRY_DELAY_S)

    async def _is_void(self, handle: KVHandle, job_id: str) -> bool:
        """Whether nobody can ever take this handle: its job has another owner or epoch by now. Raises Unavailable."""
        record, giver = await self._store.job(job_id), owner_name(handle.source.worker, handle.source.incarnation)
        return (record.get("state"), record.get("owner"), record.get("epoch")) != ("owned", giver, str(handle.epoch))

    async def _confirm(self, source: KVSource, question: dict[str, object]) -> bool | None:
        """Whether the pages still stand; None if the giver did not answer."""
        try:
            reply = await self._bus.request(subjects.kv(source.worker, source.incarnation), encode_map({"op": "confirm", **question}),
                                            CONFIRM_TIMEOUT_S)
            return decode_map(reply).get("ok") is True
        except (Unavailable, MalformedMessage):
            return None


def _tops_of(handle: KVHandle) -> list[TopLogprobs]:
    try:
        return list(unpack_tops(handle.top_logprobs))
    except ValueError as error:
        raise MalformedMessage(f"KV handle: top_logprobs: {error}") from None
