"""Pull jobs by free capacity, claim them, take them up where the former owner stopped (docs/protocol.md, claim and resume)."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from coordinator import subjects
from coordinator.bus import Bus, Delivery
from coordinator.errors import InvalidField, MalformedMessage, TokenmillError, Unavailable
from coordinator.fold import Shown, fold
from coordinator.messages import DeadLetter, Job, TokenRun, check_id, decode_map
from coordinator.store import Claim, Store, owner_name
from coordinator.tokenizer import Tokenizer
from workers.active_job import ActiveJob, open_job
from workers.jobs import Identity, Jobs

log = logging.getLogger(__name__)

WAIT_STEP_S = 0.25
MAX_CHAINS = 8


class Intake:
    """Turns one delivery from JOBS into a running job, a final record or a dead letter; never into silence."""

    def __init__(self, me: Identity, tokenizer: Tokenizer, bus: Bus, store: Store, jobs: Jobs, is_cancelled: Callable[[str], bool]) -> None:
        self._me = me
        self._tokenizer = tokenizer
        self._bus = bus
        self._store = store
        self._jobs = jobs
        self._is_cancelled = is_cancelled
        self._claiming: set[str] = set()
        self.num_refused = 0
        self._lives = count()

    async def accept(self, delivery: Delivery) -> None:
        """Ends with the job claimed, the delivery acknowledged, or left to its live owner."""
        try:
            job = _seeded(Job.decode(delivery.data))
        except (MalformedMessage, InvalidField) as error:
            await self._refuse(delivery, error)
            return
        await self._hold(job, delivery)

    async def _hold(self, job: Job, delivery: Delivery, refusal: str = "") -> None:
        if job.job_id in self._claiming or self._jobs.get(job.job_id) is not None:
            return  # a redelivery of what this worker has
        self._claiming.add(job.job_id)
        try:
            await self._claim(job, delivery, refusal)
        except Unavailable as error:
            log.warning("job %s: not claimed: %s", job.job_id, error)  # ack_wait brings it back
        finally:
            self._claiming.discard(job.job_id)

    async def _claim(self, job: Job, delivery: Delivery, refusal: str) -> None:
        prompt_ids = list(job.prompt_ids) if job.prompt_ids is not None else self._tokenizer.encode(
            job.text or "", add_special_tokens=job.params.add_special_tokens)
        early = self._start_early(job, delivery, prompt_ids) if delivery.num_delivered == 1 and not refusal else None
        await asyncio.sleep(0)  # the loop hands it to the engine now, not behind the claim
        try:
            claim, num_asserts = await self._ask(job, delivery)
            if early is not None and self._is_plain(job, claim) and self._jobs.num_asserts == num_asserts:
                self._jobs.confirm(early, claim.epoch)
                return
        except BaseException:
            if early is not None:
                self._jobs.forget(early)
            raise
        if early is not None:
            self._jobs.forget(early)
        if claim.state == "done":
            await delivery.ack()
        if claim.state != "granted":
            return
        shown: Shown | None = Shown()
        if claim.chains or claim.unfenced or delivery.num_delivered > 1:
            shown = await self._pick_up(job, claim, delivery)
        if shown is None:
            return
        if self._jobs.num_asserts != num_asserts:
            # Redis lost data, and this job was not among those asserted: void, unless the claim was made behind the assertion.
            if await self._store.give_up(self._me.owner, job.job_id, claim.epoch):
                await delivery.nak()
            return
        active = open_job(self._tokenizer, job, epoch=claim.epoch, ack_subject=delivery.ack_subject, chains=(*claim.chains, self._me.owner),
                          prompt_ids=prompt_ids, shown=shown)
        if shown.finish is not None:
            self._jobs.add(active)
            self._jobs.repair(active)
        elif refusal or shown.has_gap:
            self._jobs.add(active)
            self._jobs.end(active, "error", refusal or "tokens that were shown have aged out of the stream: the answer cannot be continued")
        elif (reason := self._reason_to_end(job, claim)) is not None:
            self._jobs.add(active)
            self._jobs.end(active, reason)
        elif claim.record.is_guilty:
            await self._condemn(active, claim, delivery)
        elif claim.record.is_suspect:
            self._jobs.start_trial(active)
        else:
            self._jobs.start(active)

    def _start_early(self, job: Job, delivery: Delivery, prompt_ids: list[int]) -> ActiveJob | None:
        """A job's first delivery is nearly always ours to run: prefill begins while Redis is asked. Nothing is emitted before it agrees."""
        if self._is_cancelled(job.job_id):
            return None
        active = open_job(self._tokenizer, job, epoch=0, ack_subject=delivery.ack_subject, chains=(self._me.owner,), prompt_ids=prompt_ids,
                          shown=Shown(), life=f"early{next(self._lives)}")
        self._jobs.start_early(active)
        return active

    def _is_plain(self, job: Job, claim: Claim) -> bool:
        """Granted, and nobody had the job before us."""
        return (claim.state == "granted" and not claim.chains and not claim.unfenced and not claim.record.is_suspect
                and self._reason_to_end(job, claim) is None)

    async def _condemn(self, active: ActiveJob, claim: Claim, delivery: Delivery) -> None:
        """A job that takes its workers down with it is withdrawn, whole and with its history."""
        record, job_id = claim.record, active.job.job_id
        reason = (f"its workers ended while it ran: {record.crashes + record.trial_crashes} engine crashes, "
                  f"{record.deaths + record.trial_deaths} workers lost")
        log.error("job %s withdrawn: %s", job_id, reason)
        letter = DeadLetter(subject=delivery.subject, reason=reason, payload=delivery.data, at_ms=int(time.time() * 1000), job_id=job_id,
                            history=claim.chains)
        await self._jobs.until_available(lambda: self._bus.dead_letter(letter, self._me.model))
        self._jobs.add(active)
        self._jobs.end(active, "error", f"withdrawn: {reason}")

    async def _ask(self, job: Job, delivery: Delivery) -> tuple[Claim, int]:
        """(claim, how often this worker had asserted its jobs before it).

        Asked until answered: a claim whose reply was lost may have made us the owner, and then nobody else would take the job up.
        """
        roster: list[str] = []
        era = ""
        while True:
            num_asserts = self._jobs.num_asserts
            try:
                claim = await self._store.claim(self._me.owner, job.job_id, ack=delivery.ack_subject, origin=job.origin, model=job.model,
                                                stream_seq=delivery.stream_seq, roster=roster, roster_era=era)
                if claim.floor_era:
                    await self._store.set_floor(claim.floor_era, await self._bus.last_job_seq())
                if claim.state == "need_roster":
                    era = claim.era
                    roster = [owner_name(worker, incarnation) for worker, incarnation in await self._bus.roster()]
                    continue
            except Unavailable as error:
                log.warning("job %s: not claimed yet: %s", job.job_id, error)
                await asyncio.sleep(WAIT_STEP_S)
                continue
            if claim.state != "wait":
                return claim, num_asserts
            await delivery.in_progress()
            await asyncio.sleep(min(claim.wait_s, WAIT_STEP_S))

    async def _pick_up(self, job: Job, claim: Claim, delivery: Delivery) -> Shown | None:
        """What was shown; None: the job is over, and tidied away. Tried until it works: it is ours, so nobody else would do it."""
        while True:
            try:
                if await self._bus.get_result(job.job_id) is None:
                    return await self._resume(job, claim, delivery)
                await self._store.finish(self._me.owner, job.job_id)
                await delivery.ack()
                return None
            except Unavailable as error:
                log.warning("job %s: not read yet: %s", job.job_id, error)
                await asyncio.sleep(WAIT_STEP_S)

    async def _resume(self, job: Job, claim: Claim, delivery: Delivery) -> Shown:
        """Fence those from whom the job was taken, then read what readers were shown: in this order, and before a word of our own."""
        for owner in claim.unfenced:
            await self._bus.fence(_chain_of(job, owner), by=self._me.owner)
            await self._store.fenced(job.job_id, owner)
        owners = {*claim.chains, *claim.unfenced, self._me.owner}
        # After a sweep the whole roster may have emitted: then one read of everything of this producer is less.
        chains = [_chain_of(job, owner) for owner in owners] if len(owners) <= MAX_CHAINS else [subjects.chains(job.origin)]
        runs: list[tuple[str, TokenRun]] = []
        for chain in chains:
            found = await self._bus.read_chain(chain, start_time_ms=job_start_ms(delivery))
            runs += [(subject, run) for subject, _, frame in found for run in frame.runs if run.job_id == job.job_id]
        shown = fold(runs)
        log.info("job %s: taken over at epoch %d, %d tokens were shown", job.job_id, claim.epoch, len(shown.token_ids))
        return shown

    def _reason_to_end(self, job: Job, claim: Claim) -> str | None:
        if claim.is_cancelled or self._is_cancelled(job.job_id):
            return "cancelled"
        if job.deadline_ms is not None and time.time() * 1000 > job.deadline_ms:
            return "expired"
        return None

    async def _refuse(self, delivery: Delivery, error: TokenmillError) -> None:
        """Keep what cannot be served as a dead letter, with its reason; end the job as failed if the bytes say whose it is."""
        self.num_refused += 1
        log.warning("refused a message on %s: %s", delivery.subject, error)
        letter = DeadLetter(subject=delivery.subject, reason=str(error), payload=delivery.data, at_ms=int(time.time() * 1000))
        try:
            body = decode_map(delivery.data)
            job_id, origin = check_id("job_id", body.get("job_id", "")), check_id("origin", body.get("origin", ""))
        except (MalformedMessage, InvalidField):
            await self._jobs.until_available(lambda: self._bus.dead_letter(letter, self._me.model))
            await delivery.ack()
            return
        await self._jobs.until_available(lambda: self._bus.dead_letter(replace(letter, job_id=job_id), self._me.model))
        await self._hold(Job(job_id=job_id, origin=origin, model=self._me.model, text="-"), delivery, refusal=str(error))


def _chain_of(job: Job, owner: str) -> str:
    worker, _, incarnation = owner.rpartition(".")
    return subjects.chain(job.origin, worker, int(incarnation))


def job_start_ms(delivery: Delivery) -> int:
    """No frame of a job is older than its message; one second of slack for clocks that are set back."""
    return max(0, delivery.timestamp_ms - 1000)


def _seeded(job: Job) -> Job:
    """A job without a seed gets one that every worker derives alike, so that a resumed job draws the same numbers."""
    if job.params.seed is not None:
        return job
    digest = hashlib.blake2b(job.job_id.encode(), digest_size=8).digest()
    return replace(job, params=replace(job.params, seed=int.from_bytes(digest, "little")))


