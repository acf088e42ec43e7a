"""The protocol of docs/protocol.md as an executable model: who owns a job, how its answer is committed, whatever dies.

A state is a value; `steps` lists all that may happen next. Workers are *incarnations*: one that was fenced, condemned or killed never
comes back, its process goes on as another slot. Every step is what one party does atomically (one Lua script, one stored message, one
message received); between any two steps anything else may happen. A publish that is stored after its sender died needs no step of its
own: it looks like a publish before the death. A pause of any length is a worker that takes no step while its lease lapses.

    environment    crash, lapse, redelivery, broker restart, Redis emptied or restored older, lost reply, cancel: counted, see Faults
    worker         register, announce, renew, assert, pull, claim, fence, read, emit, fold, finish, acknowledge, give up
    hand-over      pin + offer, copy, confirm, take, unpin, take back

`SWITCHES` names the rules that can be broken, one by one, to see that each is needed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SWITCHES = {
    "no_fence": "the new owner does not fence",
    "forget_unfenced": "a claim fences the last owner only, not those whose fencing is not yet confirmed",
    "read_first": "the new owner reads the chains before it fences them",
    "skip_empty_chains": "a chain without frames is not fenced",
    "forget_chains": "the new owner reads only the chains that it fenced",
    "fold_gaps": "a last frame is taken for the end although tokens before it are missing",
    "fence_givers": "a claim also fences those who gave the job away",
    "no_condemn": "an owner from whom a job was taken may renew its lease",
    "ack_early": "the message is acknowledged while the job runs",
    "ack_before_done": "the message is acknowledged before Redis says done",
    "no_watch_done": "nobody clears a dead owner's claim on a job that has its final record",
    "no_cas_take": "a decode worker takes a job without comparing epoch and owner",
    "offer_before_ack": "the handle is published before the first token is stored",
    "no_confirm": "a decode worker does not ask whether the pages stayed pinned",
    "confirm_before_copy": "it asks before it copies",
    "no_generation": "the answer does not compare the pin's generation",
    "take_back_same_epoch": "a giver goes on by itself under the epoch of the handle that is out",
    "give_up_in_flight": "a job is put back while a frame with its token is still under way",
    "cancel_while_offered": "a giver ends a cancelled job without taking it back first",
    "cancel_skips_chain": "a cancelled job's final record is written without a last frame",
    "trust_older": "a Redis restored from an older file is taken for the truth",
    "no_grace": "after a loss of Redis, jobs are claimed before the living could assert theirs",
    "late_assert": "a worker may assert its jobs after grace",
    "no_roster": "a job without a record is taken for a new one",
    "sweep_lapsed": "a sweep also fences those whose lease has lapsed, though they may renew",
    "stale_roster": "a roster read in an earlier era is used",
    "claim_before_announce": "a worker claims before its roster message is stored",
    "announce_first": "a worker is on the roster before it has a lease",
    "assert_offered": "a giver asserts the jobs that it has offered",
    "keep_claiming": "a claim granted before the loss goes on with fencing and reading after it",
    "take_unswept": "an asserted job is handed over before a claim swept the roster",
    "forget_loser": "of two that assert a job, the loser is not remembered as to be fenced",
    "plain_epochs": "epochs count from what Redis remembers, without the clock",
}


class Faults(NamedTuple):
    """How often each fault may still happen. `give` bounds offers and jobs put back, which are no faults but would go on for ever."""

    crash: int = 0
    lapse: int = 0           # a lease runs out, or a grace passes, although the worker lives: a pause, a cut
    redeliver: int = 0       # of a message whose holder lives
    restart: int = 0         # broker: everything unacknowledged is delivered again
    empty: int = 0           # Redis loses everything
    older: int = 0           # Redis comes back as it was at some earlier moment
    lost_reply: int = 0      # a script ran, its caller does not know
    cancel: int = 0
    give: int = 0


NO_FAULTS = Faults()


@dataclass(frozen=True)
class Setting:
    """What is explored. `origins[j]` is the producer of job j: jobs of one origin share each worker's chain."""

    workers: int = 2                       # incarnations, successors included
    jobs: int = 1
    tokens: int = 2                        # per job
    faults: Faults = NO_FAULTS
    origins: tuple[int, ...] = ()
    joins: bool = False                    # workers start unregistered; else all are registered and announced
    decoders: int = 0                      # the last so many workers take handles and never pull jobs
    broken: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        unknown = self.broken - set(SWITCHES)
        if unknown:
            raise ValueError(f"no such switch: {', '.join(sorted(unknown))}")

    def origin(self, j: int) -> int:
        return self.origins[j] if self.origins else 0


class Local(NamedTuple):
    """What one incarnation knows of one job. The phases, in their usual order:

    idle got fence work fold finish ack | offered (giver) | copy copied sure (taker) | gap | leaking (broken rule only)
    """

    pc: str = "idle"
    epoch: int = 0
    next_token: int = 0
    chains: frozenset[int] = frozenset()    # owners whose chains may hold frames of the job
    unfenced: frozenset[int] = frozenset()  # to be fenced before reading
    giver: int = -1                         # of the handle being imported
    generation: int = 0                     # of the pin: offered, or named by the handle being imported
    flag: bool = False                      # copied, sure: the copy is good · work: asserted, not swept · offered: a token is still unsaid
    roster: tuple[int, frozenset[int]] | None = None   # got: (era, incarnations) as read


IDLE = Local()
HOLDING = ("fence", "work", "gap", "fold", "finish", "ack", "offered")
ASSERTED = ("work", "fold")
DROPPED = ("fence", "gap", "offered")    # claimed but not yet read, or perhaps taken by somebody: only a new claim can tell


class Slot(NamedTuple):
    """One incarnation. It has one page; `pin` is (job, generation) of what stands in it."""

    life: str                     # new registered announced up gone
    fresh: bool                   # has done nothing yet
    local: tuple[Local, ...]
    pin: tuple[int, int] | None = None
    generations: int = 0


class Record(NamedTuple):
    """A job in Redis. `stale`: of an earlier era, only the epoch counts."""

    state: str                    # owned queued done stale
    epoch: int = 0
    owner: int = -1
    is_swept: bool = False
    chains: frozenset[int] = frozenset()
    unfenced: frozenset[int] = frozenset()


class Redis(NamedTuple):
    records: tuple[Record | None, ...]
    leases: tuple[str, ...]       # none live lapsed
    grace: bool = False


class Handle(NamedTuple):
    epoch: int
    owner: int
    next_token: int
    chains: frozenset[int]
    generation: int
    holder: int = -1              # who pulled it; -1: queued


class Job(NamedTuple):
    message: str = "queued"       # queued flight gone
    result: tuple[int | str, ...] | None = None
    is_cancelled: bool = False
    is_young: bool = True         # submitted in this era
    top: int = 0                  # highest epoch ever given: what the clock in an epoch stands for
    handles: tuple[Handle, ...] = ()


class Chain(NamedTuple):
    frames: tuple[tuple[int, int, str], ...] = ()   # (job, first index, reason of a last frame or "")
    is_sealed: bool = False


class State(NamedTuple):
    slots: tuple[Slot, ...]
    jobs: tuple[Job, ...]
    redis: Redis
    chains: tuple[tuple[Chain, ...], ...]         # per worker and origin
    roster: frozenset[int]
    left: Faults
    era: int = 0
    guilty: frozenset[int] = frozenset()          # let its lease lapse until somebody acted on it
    older: Redis | None = None                    # what a restore would bring back
    flaw: str = ""                                # a rule that the last step itself broke


class Step(NamedTuple):
    """`kind`: work (happens in the end), late (too, but only after some waiting), choice (may never happen), fault."""

    name: str
    state: State
    kind: str = "work"


def start(setting: Setting) -> State:
    num_origins = max(setting.origin(j) for j in range(setting.jobs)) + 1
    idle = (IDLE,) * setting.jobs
    every = range(setting.workers)
    return State(
        slots=tuple(Slot("new" if setting.joins else "up", True, idle) for _ in every),
        jobs=(Job(),) * setting.jobs,
        redis=Redis((None,) * setting.jobs, (("none" if setting.joins else "live"),) * setting.workers),
        chains=((Chain(),) * num_origins,) * setting.workers,
        roster=frozenset() if setting.joins else frozenset(every),
        left=setting.faults)


# ---- reading and changing states ----

def put(items: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*items[:i], value, *items[i + 1:])


# Built field by field: `_replace` of the many states would take half of the time.

def with_slot(s: State, w: int, slot: Slot) -> State:
    return State(put(s.slots, w, slot), *s[1:])


def with_local(s: State, w: int, j: int, local: Local) -> State:
    slot = s.slots[w]
    return with_slot(s, w, Slot(slot.life, False, put(slot.local, j, local), slot.pin, slot.generations))


def with_job(s: State, j: int, **change: Any) -> State:
    return State(s.slots, put(s.jobs, j, s.jobs[j]._replace(**change)), *s[2:])


def with_record(s: State, j: int, record: Record | None) -> State:
    redis = s.redis
    return State(s.slots, s.jobs, Redis(put(redis.records, j, record), redis.leases, redis.grace), *s[3:])


def with_lease(s: State, w: int, lease: str) -> State:
    redis = s.redis
    return State(s.slots, s.jobs, Redis(redis.records, put(redis.leases, w, lease), redis.grace), *s[3:])


def spend(s: State, fault: str) -> State:
    return s._replace(left=s.left._replace(**{fault: getattr(s.left, fault) - 1}))


def known(s: State, j: int) -> Record | None:
    """The job's record as scripts see it: one of an earlier era counts as missing."""
    record = s.redis.records[j]
    return None if record is None or record.state == "stale" else record


def lives(s: State, w: int) -> bool:
    return s.redis.leases[w] == "live"


def owns(s: State, w: int, j: int, epoch: int) -> bool:
    record = known(s, j)
    return record is not None and record.state == "owned" and record.owner == w and record.epoch == epoch


def next_epoch(m: Setting, s: State, j: int) -> int:
    record = s.redis.records[j]
    if "plain_epochs" in m.broken:
        return (record.epoch if record else 0) + 1
    return s.jobs[j].top + 1


class Shown(NamedTuple):
    """What some chains hold of a job: token indices in order, and (index, reason) of last frames."""

    tokens: list[int]
    ends: list[tuple[int, str]]

    @property
    def is_gapless(self) -> bool:
        return self.tokens == list(range(len(self.tokens))) and all(at == len(self.tokens) for at, _ in self.ends)

    @property
    def record(self) -> tuple[int | str, ...]:
        return (*self.tokens, *(reason for _, reason in self.ends))


def read(m: Setting, s: State, j: int, owners: frozenset[int] | None = None) -> Shown:
    """A job's frames on these owners' chains; None: on all."""
    tokens: list[int] = []
    ends: list[tuple[int, str]] = []
    for w, per_origin in enumerate(s.chains):
        if owners is None or w in owners:
            for job, at, reason in per_origin[m.origin(j)].frames:
                if job == j:
                    if reason:
                        ends.append((at, reason))
                    else:
                        tokens.append(at)
    return Shown(sorted(tokens), ends)


def end(s: State, w: int) -> State:
    """The incarnation is over: fenced, condemned, or its process is gone. Everything it held is dropped, its pages are reused."""
    return with_slot(s, w, Slot("gone", False, (IDLE,) * len(s.slots[w].local)))


def emit(m: Setting, s: State, w: int, j: int, reason: str, after: Local) -> State:
    """One compare-and-set publish on the worker's chain: the next token, or with a reason the last frame.

    A tombstone there ends the incarnation, which registers anew.
    """
    chain = s.chains[w][m.origin(j)]
    if chain.is_sealed:
        return with_lease(end(s, w), w, "none")
    # Sorted: no rule looks at the order of frames within one chain, and fewer states differ.
    chain = Chain(tuple(sorted((*chain.frames, (j, s.slots[w].local[j].next_token, reason)))))
    return with_local(s._replace(chains=put(s.chains, w, put(s.chains[w], m.origin(j), chain))), w, j, after)


# ---- everything that may happen ----

def steps(m: Setting, s: State) -> Iterator[Step]:
    if s.flaw:
        return
    yield from environment(m, s)
    new_may_act = fresh_may_act = True
    for w, slot in enumerate(s.slots):
        if slot.life == "gone":
            continue
        # Untouched workers are alike: the lowest acts first, of each kind (this only leaves out mirror images).
        if slot.fresh and w < m.workers - m.decoders:
            if slot.life == "new":
                if not new_may_act:
                    continue
                new_may_act = False
            elif slot.life == "up" and lives(s, w):
                if not fresh_may_act:
                    continue
                fresh_may_act = False
        yield from membership(m, s, w)
        if slot.life == "up" or (slot.life == "registered" and "claim_before_announce" in m.broken):
            for j in range(m.jobs):
                for act in ACTS[slot.local[j].pc]:
                    yield from act(m, s, w, j)


def environment(m: Setting, s: State) -> Iterator[Step]:
    left = s.left
    for j, job in enumerate(s.jobs):
        if job.message == "flight":
            is_beaten = any(lives(s, w) and slot.life == "up" and slot.local[j].pc in HOLDING for w, slot in enumerate(s.slots))
            if not is_beaten:
                yield Step(f"redeliver job {j}", with_job(s, j, message="queued"), "late")
            elif left.redeliver:
                yield Step(f"redeliver job {j} too early", with_job(spend(s, "redeliver"), j, message="queued"), "fault")
        for i, handle in enumerate(job.handles):
            if handle.holder >= 0:
                back = with_job(s, j, handles=put(job.handles, i, handle._replace(holder=-1)))
                if s.slots[handle.holder].life == "gone":
                    yield Step(f"redeliver handle of {j}", back, "late")
                elif left.redeliver:
                    yield Step(f"redeliver handle of {j} too early", spend(back, "redeliver"), "fault")
        if left.cancel and not job.is_cancelled and job.result is None:
            yield Step(f"cancel {j}", with_job(spend(s, "cancel"), j, is_cancelled=True), "fault")
        record = known(s, j)
        if (record and record.state != "done" and job.result is not None and not (record.owner >= 0 and lives(s, record.owner))
                and "no_watch_done" not in m.broken):
            yield Step(f"watcher clears {j}", with_record(s, j, Record("done", record.epoch)))
    if left.restart and any(job.message == "flight" or any(h.holder >= 0 for h in job.handles) for job in s.jobs):
        jobs = tuple(job._replace(message="queued" if job.message == "flight" else job.message,
                                  handles=tuple(h._replace(holder=-1) for h in job.handles)) for job in s.jobs)
        yield Step("broker restarts", spend(s, "restart")._replace(jobs=jobs), "fault")
    yield from redis_losses(m, s)


def redis_losses(m: Setting, s: State) -> Iterator[Step]:
    if s.left.empty:
        yield Step("Redis is emptied", new_era(m, spend(s, "empty"), (None,) * m.jobs), "fault")
    if s.left.older:
        if s.older is None:
            yield Step("Redis saves", s._replace(older=s.redis), "fault")
        elif s.older != s.redis:
            old = spend(s, "older")._replace(older=None)
            if "trust_older" in m.broken:
                yield Step("Redis is restored", old._replace(redis=s.older), "fault")
            else:
                stale = tuple(r and Record("stale", r.epoch) for r in s.older.records)
                yield Step("Redis is restored", new_era(m, old, stale), "fault")
    if s.redis.grace:
        late = [w for w, slot in enumerate(s.slots) if slot.life not in ("new", "gone") and s.redis.leases[w] == "none"]
        over = s._replace(redis=s.redis._replace(grace=False), guilty=s.guilty | set(late))
        if not late:
            yield Step("grace is over", over, "late")
        elif s.left.lapse:
            yield Step(f"grace is over without {late}", spend(over, "lapse"), "fault")


def new_era(m: Setting, s: State, records: tuple[Record | None, ...]) -> State:
    jobs = tuple(job._replace(is_young=False) for job in s.jobs)
    return s._replace(redis=Redis(records, ("none",) * m.workers, True), jobs=jobs, era=s.era + 1)


def membership(m: Setting, s: State, w: int) -> Iterator[Step]:
    """Registering, renewing, asserting; lapsing and dying."""
    slot, lease = s.slots[w], s.redis.leases[w]
    announce_first = "announce_first" in m.broken

    def living(life: str) -> State:
        return with_slot(s, w, slot._replace(life=life))

    if slot.life == "new":
        yield Step(f"{w} announces" if announce_first else f"{w} registers",
                   living("announced")._replace(roster=s.roster | {w}) if announce_first else with_lease(living("registered"), w, "live"))
        return
    if slot.life == "registered":
        yield Step(f"{w} announces", living("up")._replace(roster=s.roster | {w}))
    elif slot.life == "announced":
        yield Step(f"{w} registers", with_lease(living("up"), w, "live"))
        return
    if s.left.crash:
        dead = end(spend(s, "crash"), w)
        yield Step(f"{w} crashes", with_lease(dead, w, "lapsed") if lease == "live" else dead, "fault")
    if lease == "live" and s.left.lapse:
        yield Step(f"lease of {w} lapses", with_lease(spend(s, "lapse"), w, "lapsed"), "fault")
    elif lease == "lapsed":
        yield Step(f"{w} renews", with_lease(s, w, "live"))
    elif lease == "none":
        if s.redis.grace or "late_assert" in m.broken:
            yield Step(f"{w} asserts", assert_again(m, s, w))
        else:
            yield Step(f"{w} is told that it is over", end(s, w))


def assert_again(m: Setting, s: State, w: int) -> State:
    """One script: the lease, and every job past its fence that is not offered. Others that Redis had as its own are dropped."""
    s = with_lease(s, w, "live")
    if not s.redis.grace:
        s = s._replace(guilty=s.guilty - {w})    # broken rule: Redis has told it that all is well
    phases = (*ASSERTED, "offered") if "assert_offered" in m.broken else ASSERTED
    for j, local in enumerate(s.slots[w].local):
        if local.pc in phases:
            s = assert_job(m, s, w, j, local)
        elif local.pc in DROPPED and not (local.pc == "fence" and "keep_claiming" in m.broken):
            s = with_local(s, w, j, IDLE)
            slot = s.slots[w]
            if slot.pin and slot.pin[0] == j:
                s = with_slot(s, w, slot._replace(pin=None))
    return s


def assert_job(m: Setting, s: State, w: int, j: int, local: Local) -> State:
    record = known(s, j)
    remembers = "forget_loser" not in m.broken
    if record and (record.state == "done" or record.epoch >= local.epoch):
        # Told that the job is lost. Until the answer is there its frames may still be stored: hence to be fenced.
        return with_record(s, j, record._replace(unfenced=record.unfenced | {w})) if remembers and record.state != "done" else s
    loser = record.unfenced | ({record.owner} if record.owner >= 0 else set()) if record and remembers else frozenset()
    s = with_record(s, j, Record("owned", local.epoch, w, "take_unswept" in m.broken, local.chains | {w}, frozenset(loser)))
    return with_local(s, w, j, local._replace(flag=True)) if local.pc == "work" else s


# ---- a job in one worker ----

def pull(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    job = s.jobs[j]
    if not lives(s, w):
        return
    if job.message == "queued" and w < m.workers - m.decoders:
        yield Step(f"{w} pulls {j}", with_local(with_job(s, j, message="flight"), w, j, Local("got")))
    for i, h in enumerate(job.handles):
        if h.holder < 0:
            held = with_job(s, j, handles=put(job.handles, i, h._replace(holder=w)))
            yield Step(f"{w} pulls a handle of {j}",
                       with_local(held, w, j, Local("copy", h.epoch, h.next_token, h.chains, giver=h.owner, generation=h.generation)))


def drop_handle(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    """A handle that this worker has taken, or found worthless, is acknowledged; a crash before that delivers it again."""
    handles = s.jobs[j].handles
    for i, h in enumerate(handles):
        if h.holder == w:
            yield Step(f"{w} acks a handle of {j}", with_job(s, j, handles=handles[:i] + handles[i + 1:]))


def claim(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    job, local, record = s.jobs[j], s.slots[w].local[j], known(s, j)
    if job.result is not None:
        yield Step(f"{w} sees the result of {j}", with_local(finished(s, j), w, j, Local("ack")))
        return
    if record and record.state == "done":
        yield Step(f"{w} sees {j} done", with_local(s, w, j, Local("ack")))
        return
    if "cancel_skips_chain" in m.broken and job.is_cancelled:
        tokens = read(m, s, j).tokens
        yield Step(f"{w} cancels {j}", with_local(with_job(s, j, result=(*tokens, "cancelled")), w, j, Local("finish")))
    if not lives(s, w):
        return
    owner = record.owner if record else -1
    if owner not in (-1, w) and lives(s, owner):
        yield Step(f"{w} ignores a copy of {j}", with_local(s, w, j, IDLE))
        return
    sweeps = not (record.is_swept if record else job.is_young)
    if s.redis.grace and "no_grace" not in m.broken and (sweeps or owner not in (-1, w)):
        return
    has_roster = local.roster is not None and (local.roster[0] == s.era or "stale_roster" in m.broken)
    if sweeps and not has_roster and "no_roster" not in m.broken:
        yield Step(f"{w} reads the roster for {j}", with_local(s, w, j, local._replace(roster=(s.era, s.roster))))
        return
    granted = grant(m, s, w, j, record, local.roster[1] if sweeps and local.roster else frozenset())
    now = known(granted, j)
    assert now
    chains = now.unfenced | {w} if "forget_chains" in m.broken else now.chains
    shown = read(m, s, j, now.chains)
    unfenced = frozenset() if "no_fence" in m.broken else now.unfenced
    fencing = Local("fence", now.epoch, len(shown.tokens) if "read_first" in m.broken and not shown.ends else 0, chains, unfenced)
    yield Step(f"{w} claims {j}", with_local(granted, w, j, fencing))
    if s.left.lost_reply:
        yield Step(f"{w} claims {j}, reply lost", spend(granted, "lost_reply"), "fault")


def grant(m: Setting, s: State, w: int, j: int, record: Record | None, roster: frozenset[int]) -> State:
    """The claim script's change, atomic."""
    unfenced = frozenset() if record is None or "forget_unfenced" in m.broken else record.unfenced
    chains = (record.chains if record else frozenset()) | roster | {w}
    if record and record.owner >= 0 and record.owner != w:
        unfenced |= {record.owner}
        if "no_condemn" not in m.broken:
            s = with_lease(s, record.owner, "none")._replace(guilty=s.guilty | {record.owner})
    if record and "fence_givers" in m.broken:
        unfenced |= record.chains
    unfenced |= {o for o in roster if s.redis.leases[o] == "none" or ("sweep_lapsed" in m.broken and not lives(s, o))}
    epoch = next_epoch(m, s, j)
    s = with_job(s, j, top=max(epoch, s.jobs[j].top))
    return with_record(s, j, Record("owned", epoch, w, True, chains, unfenced - {w}))


def fence(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    local = s.slots[w].local[j]
    for o in local.unfenced:
        origin = m.origin(j)
        chain = s.chains[o][origin]
        if chain.frames or "skip_empty_chains" not in m.broken:
            chain = chain._replace(is_sealed=True)
        t = s._replace(chains=put(s.chains, o, put(s.chains[o], origin, chain)))
        record = known(s, j)
        if record and o in record.unfenced:
            t = with_record(t, j, record._replace(unfenced=record.unfenced - {o}))
        if s.slots[o].life not in ("new", "gone") and o not in s.guilty:
            t = t._replace(flaw=f"worker {o} lives, is innocent, and was fenced")
        yield Step(f"{w} fences {o} for {j}", with_local(t, w, j, local._replace(unfenced=local.unfenced - {o})))
    if not local.unfenced:
        shown = read(m, s, j, local.chains)
        after = local._replace(pc="fold" if shown.ends else "work", next_token=len(shown.tokens))
        if not shown.is_gapless and "fold_gaps" not in m.broken:
            after = after._replace(pc="gap")
        elif "read_first" in m.broken and not shown.ends:
            after = local._replace(pc="work")
        yield Step(f"{w} reads {len(shown.tokens)} of {j}", with_local(s, w, j, after))


def work(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    job, local, slot = s.jobs[j], s.slots[w].local[j], s.slots[w]
    if "ack_early" in m.broken and job.message != "gone":
        yield Step(f"{w} acks {j} early", with_job(s, j, message="gone"))
    if local.next_token < m.tokens:
        after = local._replace(next_token=local.next_token + 1)
        yield Step(f"{w} emits {local.next_token} of {j}", emit(m, s, w, j, "", after))
    else:
        yield Step(f"{w} emits the last frame of {j}", emit(m, s, w, j, "stop", local._replace(pc="fold")))
    if job.is_cancelled:
        yield Step(f"{w} emits cancelled for {j}", emit(m, s, w, j, "cancelled", local._replace(pc="fold")))
    if not s.left.give:
        return
    if owns(s, w, j, local.epoch):
        record = known(s, j)
        assert record
        after = local._replace(pc="leaking") if "give_up_in_flight" in m.broken else IDLE
        queued = with_record(spend(s, "give"), j, record._replace(state="queued", owner=-1))
        yield Step(f"{w} gives {j} up", with_local(queued, w, j, after), "choice")
    early = local.next_token == 0 and "offer_before_ack" in m.broken
    if (0 < local.next_token < m.tokens or early) and slot.pin is None and (not local.flag or "take_unswept" in m.broken):
        generation = slot.generations + 1
        index = local.next_token + 1 if early else local.next_token
        t = with_local(spend(s, "give"), w, j, local._replace(pc="offered", generation=generation, flag=early))
        t = with_slot(t, w, t.slots[w]._replace(pin=(j, generation), generations=generation))
        handle = Handle(local.epoch, w, index, local.chains, generation)
        yield Step(f"{w} offers {j}", with_job(t, j, handles=(*job.handles, handle)), "choice")


def leak(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    local = s.slots[w].local[j]
    yield Step(f"{w}'s late frame of {j} is stored", emit(m, s, w, j, "" if local.next_token < m.tokens else "stop", IDLE))


def gap(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    """Chains that this worker does not know of hold frames: it is not the owner any more, and its own chain will tell it."""
    yield Step(f"{w} emits an error for {j}", emit(m, s, w, j, "error", s.slots[w].local[j]._replace(pc="fold")))


def offered(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    local, slot = s.slots[w].local[j], s.slots[w]
    if local.flag:
        after = local._replace(next_token=local.next_token + 1, flag=False)
        yield Step(f"{w} emits {local.next_token} of {j} after all", emit(m, s, w, j, "", after))
    if "cancel_while_offered" in m.broken and s.jobs[j].is_cancelled:
        yield Step(f"{w} emits cancelled for {j}", emit(m, s, w, j, "cancelled", local._replace(pc="fold")))
    unpinned = slot._replace(pin=None) if slot.pin and slot.pin[0] == j else slot
    t = with_slot(s, w, unpinned)
    if unpinned != slot:
        yield Step(f"{w} unpins {j} by its own clock", t, "choice")
    record = known(s, j)
    if not record or not owns(s, w, j, max(local.epoch, record.epoch)):
        yield Step(f"{w} sees that {j} is not its own", with_local(t, w, j, IDLE))
    elif record.is_swept:    # under an epoch of ours that is later than we know, the reply to an earlier call was lost
        epoch = local.epoch if "take_back_same_epoch" in m.broken else record.epoch + 1
        t = with_job(with_record(t, j, record._replace(epoch=epoch)), j, top=max(epoch, s.jobs[j].top))
        yield Step(f"{w} takes {j} back", with_local(t, w, j, local._replace(pc="work", epoch=epoch, generation=0)), "late")
        if s.left.lost_reply:
            yield Step(f"{w} takes {j} back, reply lost", spend(t, "lost_reply"), "fault")


def copy(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    """Copying ends, confirming, taking. A copy is good if the pin stood all the time; it did if it stands at the end."""
    local = s.slots[w].local[j]
    giver = s.slots[local.giver]
    stands = giver.life == "up" and giver.pin == (j, local.generation)
    order = {"copy": "confirm", "copied": "copy"} if "confirm_before_copy" in m.broken else {"copy": "copy", "copied": "confirm"}
    if order[local.pc] == "copy":
        yield Step(f"{w} has copied {j}", with_local(s, w, j, local._replace(pc="copied" if local.pc == "copy" else "sure", flag=stands)))
        return
    said_yes = stands or "no_confirm" in m.broken or ("no_generation" in m.broken and giver.life == "up" and giver.pin is not None)
    if said_yes:
        after = local._replace(pc="copied" if local.pc == "copy" else "sure")
        yield Step(f"{w} is told that the pin of {j} stands", with_local(s, w, j, after))
    else:
        yield Step(f"{w} is told that the pin of {j} is gone", with_local(s, w, j, IDLE))


def take(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    local, record = s.slots[w].local[j], known(s, j)
    mine = Local("work", local.epoch + 1, local.next_token, local.chains | {w})
    flaw = "" if local.flag else f"{w} decodes job {j} from pages that were not its own"
    if record and record.state == "owned" and record.owner == w and record.epoch == local.epoch + 1:
        yield Step(f"{w} takes {j} (again)", with_local(s, w, j, mine)._replace(flaw=flaw))
    elif not lives(s, w):
        return
    elif record and ((record.is_swept and owns(s, local.giver, j, local.epoch)) or "no_cas_take" in m.broken):
        taken = with_record(s, j, record._replace(state="owned", epoch=local.epoch + 1, owner=w, chains=record.chains | {w}))
        taken = with_job(taken, j, top=max(local.epoch + 1, s.jobs[j].top))
        yield Step(f"{w} takes {j}", with_local(taken, w, j, mine)._replace(flaw=flaw))
        if s.left.lost_reply:
            yield Step(f"{w} takes {j}, reply lost", spend(taken, "lost_reply"), "fault")
    else:
        yield Step(f"{w} finds its handle of {j} void", with_local(s, w, j, IDLE))


def fold(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    shown = read(m, s, j, s.slots[w].local[j].chains)
    following = "ack" if "ack_before_done" in m.broken else "finish"
    t = s if s.jobs[j].result is not None else with_job(s, j, result=shown.record)
    yield Step(f"{w} folds {j}", with_local(t, w, j, s.slots[w].local[j]._replace(pc=following)))


def finished(s: State, j: int) -> State:
    record = s.redis.records[j]
    return with_record(s, j, Record("done", record.epoch if record else 0))


def finish(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    after = IDLE if "ack_before_done" in m.broken else Local("ack")
    yield Step(f"{w} marks {j} done", with_local(finished(s, j), w, j, after))


def acknowledge(m: Setting, s: State, w: int, j: int) -> Iterator[Step]:
    after = Local("finish") if "ack_before_done" in m.broken else IDLE
    yield Step(f"{w} acks {j}", with_local(with_job(s, j, message="gone"), w, j, after))


Act = Callable[[Setting, State, int, int], Iterator[Step]]
ACTS: dict[str, tuple[Act, ...]] = {
    "idle": (pull, drop_handle), "got": (claim,), "fence": (fence,), "work": (work, drop_handle), "offered": (offered,),
    "copy": (copy,), "copied": (copy,), "sure": (take,), "leaking": (leak,), "gap": (gap,),
    "fold": (fold,), "finish": (finish,), "ack": (acknowledge,),
}


# ---- what must hold ----

def wrong(m: Setting, s: State) -> str:
    """What this state violates, "" if nothing."""
    if s.flaw:
        return s.flaw
    for j, job in enumerate(s.jobs):
        shown = read(m, s, j)
        if shown.tokens != list(range(len(shown.tokens))):
            return f"job {j}: token indices stored: {shown.tokens}"
        if len(shown.ends) > 1:
            return f"job {j}: {len(shown.ends)} last frames"
        if not shown.is_gapless or any(reason == "error" or (reason == "stop" and at != m.tokens) for at, reason in shown.ends):
            return f"job {j}: ended as {shown.ends[0]} after {len(shown.tokens)} of {m.tokens} tokens"
        if job.result is not None and job.result != shown.record:
            return f"job {j}: final record {job.result}, readers saw {shown.record}"
        if job.message == "gone" and job.result is None:
            return f"job {j}: acknowledged without a final record: lost"
    return ""


def is_clean(m: Setting, s: State) -> bool:
    """All jobs are over and nothing is held: pins, claims, messages, handles."""
    return (all(job.result is not None and job.message == "gone" and not job.handles for job in s.jobs)
            and all(record is None or record.state in ("done", "stale") for record in s.redis.records)
            and all(slot.pin is None and all(local.pc == "idle" for local in slot.local) for slot in s.slots))


def has_fresh_worker(m: Setting, s: State) -> bool:
    """Somebody is left who can do what is to be done (and who is not to find itself fenced at its first frame)."""
    return any(slot.life == "new" or (slot.life == "up" and s.redis.leases[w] != "none" and all(local.pc == "idle" for local in slot.local)
                                      and not any(chain.is_sealed for chain in s.chains[w]))
               for w, slot in enumerate(s.slots[:m.workers - m.decoders]))
