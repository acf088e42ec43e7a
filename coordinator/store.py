"""Who is alive and who owns which job: the only module that speaks Redis (over the connections of redis_pool.py).

Every change is one Lua script, atomic and fenced by (epoch, owner); docs/protocol.md has the rules and what each field is for. All keys
share one hash tag, so that they live in one slot of a cluster. Time is the server's (TIME), never a client's clock.

    {tokenmill}:meta            hash   run, era, grace_until, jobs_floor, incarnation, seen, hold_until
    {tokenmill}:leases          hash   "worker.incarnation" -> expiry, ms
    {tokenmill}:workers         hash   "worker.incarnation" -> msgpack of what the worker says of itself
    {tokenmill}:job:<id>        hash   state, epoch, owner, era, is_swept, chains, unfenced, ack, origin, model, cancelled;
                                       taken, crashes, on_trial, trial_deaths, trial_crashes (DeathRecord); prompt_tokens, reader
    {tokenmill}:owned:<owner>   set    job ids, so that a dead owner's jobs are found
    {tokenmill}:open            hash   job id -> "class tokens admitted_ms tenant" of what was admitted and is not over
    {tokenmill}:load, :tenants  hash   sums over `open`: tokens by class, jobs and tokens by tenant; submitted by tenant in its last minute
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
from redis.exceptions import RedisError

from coordinator import redis_pool
from coordinator.errors import FarmMismatch, QueueFull, Unavailable
from coordinator.store_scripts import HEAD, SCRIPTS

log = logging.getLogger(__name__)

PREFIX = "{tokenmill}:"
LEASE_S = 5.0
JOB_TTL_S = 24 * 3600
COMMON_LAYOUT = ("weights", "kind", "num_layers", "row", "dtype", "page_size")   # of KVLayout: equal in all workers of a model
DONE_TTL_S = 3600
REDIS_FAILURES = (RedisError, OSError, RuntimeError)   # uvloop raises RuntimeError when a connection closes under a write

ClaimState = Literal["granted", "owned", "done", "wait", "need_roster", "lapsed"]
RenewState = Literal["ok", "assert", "over"]


def owner_name(worker: str, incarnation: int) -> str:
    """One incarnation of a worker, as Redis and the chains name it."""
    return f"{worker}.{incarnation}"


class LeaseLapsed(Unavailable):
    """The caller's own lease is over, nothing was changed: it renews soon, or learns that its incarnation has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The answer to a claim. `chains` and `unfenced` are owners ("worker.incarnation"): where frames may stand, whom to fence first.

    `era` is set with need_roster: read the roster now and claim again with both. `floor_era` is set while the era's floor is not known.
    """

    state: ClaimState
    epoch: int = 0
    chains: tuple[str, ...] = ()
    unfenced: tuple[str, ...] = ()
    is_cancelled: bool = False
    record: "DeathRecord" = field(default_factory=lambda: DeathRecord())
    wait_s: float = 0.0
    era: str = ""
    floor_era: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeathRecord:
    """How often an owner of this job ended while it had the job. Most such jobs are innocent: a worker runs many at once.

    deaths      owners that vanished (lease lapsed, engine killed): anything may have done that
    crashes     engines that crashed by themselves while they ran it
    trial_…     the same while the job was the only suspect in that worker
    """

    deaths: int = 0
    crashes: int = 0
    trial_deaths: int = 0
    trial_crashes: int = 0

    @property
    def is_suspect(self) -> bool:
        """To be run as the only suspect of its worker, so that the next death tells."""
        return self.crashes > 0 or self.deaths > 1

    @property
    def is_guilty(self) -> bool:
        return self.trial_crashes > 0 or self.trial_deaths > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What is counted of a job that is about to be published."""

    job_id: str
    origin: str
    klass: str
    tenant: str
    prompt_tokens: int
    max_new_tokens: int
    is_named: bool = True        # by its client, so that it may be known already


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Bounds on open work (queued and running); 0 means none."""

    max_class_tokens: int = 8_000_000
    max_tenant_jobs: int = 0
    max_tenant_tokens: int = 0
    max_tenant_tokens_per_minute: int = 0   # of what was submitted, whether it is over or not


Blame = Literal["", "crash", "death"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One registered incarnation. `info` is what it said at registration and at its last renewal (role, model, layout, stats, …)."""

    worker: str
    incarnation: int
    is_alive: bool
    expires_in_s: float
    num_owned: int
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_serving(self) -> bool:
        """Alive, and not about to leave or to take another role: it pulls."""
        return self.is_alive and self.info.get("state", "serving") == "serving"

    @property
    def role(self) -> str:
        return str(self.info.get("role", ""))

    @property
    def stats(self) -> dict[str, Any]:
        return dict(self.info.get("stats", {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedJob:
    """What an owner says of a job when it asserts it again."""

    job_id: str
    epoch: int
    ack: str
    origin: str
    model: str
    chains: tuple[str, ...]


class Store:
    """Leases, claims and views. Every method raises Unavailable when Redis does not answer; the caller's state is then unchanged."""

    def __init__(self, url: str, *, lease_s: float = LEASE_S) -> None:
        self.url = redis_pool.without_password(url)
        self.lease_s = lease_s
        self._connections = redis_pool.connect(url)
        self._redis = self._connections.client
        self._scripts = {name: self._redis.register_script(HEAD + body) for name, body in SCRIPTS.items()}
        self._lease_ms = str(int(lease_s * 1000))

    async def close(self) -> None:
        await self._connections.close()

    async def ping(self) -> None:
        try:
            await self._redis.ping()
        except REDIS_FAILURES as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None

    async def found(self) -> None:
        """This farm is brand new: no owner can be out there, so nobody has to wait for one."""
        await self._call("found", [])

    async def set_floor(self, era: str, seq: int) -> None:
        """JOBS ended at `seq` when this era was young: younger jobs can have no owner of an earlier era."""
        await self._call("floor", [], era, seq)

    async def register(self, worker: str, info: dict[str, Any]) -> tuple[int, str]:
        """A new incarnation of `worker`, alive for one lease: (its number, larger than any before; era whose floor is not known, or "").

        It must stand on the roster before its first claim. Raises FarmMismatch: a living worker of the same model has another layout.
        """
        state, *reply = await self._call("register", [self._key("workers")], worker, msgpack.packb(info), " ".join(COMMON_LAYOUT))
        match _text(state):
            case "wait":
                raise Unavailable(f"Redis was away: others may yet say that they live; {float(reply[0]) / 1000:.1f} s to go")
            case "differs":
                mine, theirs = info["layout"], msgpack.unpackb(reply[1])["layout"]
                raise FarmMismatch(worker, str(info.get("model", "")), _text(reply[0]), {
                    name: (mine.get(name), theirs.get(name)) for name in COMMON_LAYOUT if mine.get(name) != theirs.get(name)})
        return int(reply[0]), _text(reply[1])

    async def renew(self, owner: str, info: dict[str, Any]) -> RenewState:
        """`assert`: Redis lost data, say again what you own. `over`: jobs were taken from this incarnation; it ends."""
        return _text(await self._call("renew", [self._key("workers")], owner, msgpack.packb(info)))  # type: ignore[return-value]

    async def retire(self, owner: str) -> None:
        await self._call("retire", [self._key("workers")], owner)

    async def claim(self, owner: str, job_id: str, *, ack: str, origin: str, model: str, stream_seq: int, roster: Iterable[str] = (),
                    roster_era: str = "") -> Claim:
        """Become the owner of a job that nobody else alive owns. `stream_seq` is its message's in JOBS.

        Call it only for a job that this incarnation does not hold: its own claim is granted again, under a new epoch.
        """
        reply = [_text(part) for part in await self._call(
            "claim", [self._job(job_id), self._owned(owner)], owner, job_id, ack, origin, model, stream_seq, JOB_TTL_S, roster_era,
            " ".join(roster))]
        match reply[0]:
            case "granted":
                return Claim(state="granted", epoch=int(reply[1]), chains=tuple(reply[2].split()), unfenced=tuple(reply[3].split()),
                             is_cancelled=reply[4] == "1", floor_era=reply[5],
                             record=DeathRecord(deaths=int(reply[6]), crashes=int(reply[7]), trial_deaths=int(reply[8]),
                                                trial_crashes=int(reply[9])))
            case "wait":
                return Claim(state="wait", wait_s=float(reply[1]) / 1000, floor_era=reply[2])
            case "need_roster":
                return Claim(state="need_roster", era=reply[1], floor_era=reply[2])
            case state:
                return Claim(state=state)  # type: ignore[arg-type]

    async def fenced(self, job_id: str, fenced_owner: str) -> None:
        """Note that a tombstone stands on that owner's chain for this job's origin."""
        await self._call("fenced", [self._job(job_id)], fenced_owner)

    async def take(self, job_id: str, epoch: int, *, giver: str, taker: str) -> tuple[bool, bool]:
        """Hand-over by compare-and-set on the handle's epoch: (taken, cancelled). The job's epoch is one more then.

        Not taken means that the handle is void, for everybody. Raises LeaseLapsed: the taker may not take now, others may.
        """
        reply = await self._call("take", [self._job(job_id), self._owned(giver), self._owned(taker)], giver, epoch, taker, job_id)
        if _text(reply[0]) == "lapsed":
            raise LeaseLapsed(f"the lease of {taker} has lapsed")
        return _text(reply[0]) == "taken", len(reply) > 1 and _text(reply[1]) == "1"

    async def take_back(self, owner: str, job_id: str, epoch: int) -> int | None:
        """A new epoch for the owner itself: its handle that is out becomes void. None: the job is not ours any more.

        May be repeated after a lost reply: a later epoch of ours is the earlier call's.
        """
        return int(await self._call("take_back", [self._job(job_id)], owner, epoch)) or None

    async def finish(self, owner: str, job_id: str) -> None:
        """The final record stands. For anyone who has seen it; `owner` is the caller."""
        await self._call("finish", [self._job(job_id), self._owned(owner)], owner, job_id, DONE_TTL_S)

    async def put_on_trial(self, owner: str, job_id: str, epoch: int) -> None:
        """This suspect starts to run now, as the only one of its worker."""
        await self._call("try", [self._job(job_id)], owner, epoch)

    async def give_up(self, owner: str, job_id: str, epoch: int, blame: Blame = "") -> bool:
        """Stop owning a job that goes back into the queue; `blame`: what happened to the engine that ran it. False: it was not ours."""
        return bool(await self._call("give_up", [self._job(job_id), self._owned(owner)], owner, epoch, job_id, blame))

    async def reassert(self, owner: str, info: dict[str, Any], jobs: Iterable[OwnedJob]) -> set[str] | None:
        """Say again what we own, after Redis lost data. The ids that are not ours any more; None: too late, this incarnation is over."""
        flat: list[str | int] = []
        for job in jobs:
            flat += [job.job_id, job.epoch, job.ack, job.origin, job.model, " ".join(job.chains)]
        state, *lost = await self._call("assert", [self._key("workers"), self._owned(owner)], owner, msgpack.packb(info), JOB_TTL_S, *flat)
        return {_text(job_id) for job_id in lost} if _text(state) == "ok" else None

    async def admit(self, job: "Admitted", limits: "AdmissionLimits") -> int | None:
        """Count a job in; its `finish` counts it out. The class' open tokens with it; None: a job of this id is known already.

        Raises QueueFull when the class or the tenant is at its bound.
        """
        state, *bound = await self._call(
            "admit", [self._key("open"), self._key("load"), self._key("tenants"), self._job(job.job_id)], job.job_id, job.klass,
            job.prompt_tokens + job.max_new_tokens, job.tenant or "-", limits.max_class_tokens, limits.max_tenant_jobs,
            limits.max_tenant_tokens, job.origin, job.prompt_tokens, JOB_TTL_S, int(job.is_named),
            limits.max_tenant_tokens_per_minute)
        tenant, klass = job.tenant, job.klass
        match _text(state):
            case "known":
                return None
            case "tenant_jobs":
                raise QueueFull(f"of tenant {tenant or '(none)'} ({_text(bound[0])} open jobs)")
            case "tenant_tokens" | "tenant_share":
                raise QueueFull(f"of tenant {tenant or '(none)'} ({_text(bound[0])} open tokens)")
            case "tenant_rate":
                raise QueueFull(f"of tenant {tenant or '(none)'} ({_text(bound[0])} tokens per minute)", float(bound[1]) / 1000)
            case "class_tokens":
                raise QueueFull(f"of class {klass} ({_text(bound[0])} open tokens)")
        return int(bound[0])

    async def note_reader(self, job_id: str, reader: str) -> None:
        """Somebody reads this job's answer now: who read it before need not cancel it."""
        await self._call("reader", [self._job(job_id)], reader)

    async def discharge(self, job_id: str) -> None:
        """Count a job out that was admitted and surely not published."""
        await self._call("discharge", [self._job(job_id)], job_id)

    async def stale_admissions(self, max_age_s: float) -> list[str]:
        return [_text(job_id) for job_id in await self._call("stale", [self._key("open")], int(max_age_s * 1000))]

    async def cancel(self, job_id: str) -> bool:
        """Remember that a job is to be cancelled, for whoever claims or takes it. False: it is over already."""
        return bool(await self._call("cancel", [self._job(job_id)], JOB_TTL_S))

    async def workers(self, model: str | None = None) -> list[WorkerView]:
        """Every registered incarnation, the lapsed ones too until they are buried."""
        views = []
        for name, left_ms, info, owned in await self._call("view", [self._key("workers")]):
            worker, _, incarnation = _text(name).rpartition(".")
            left_s = float(left_ms) / 1000
            view = WorkerView(worker=worker, incarnation=int(incarnation), is_alive=left_s > 0, expires_in_s=max(0.0, left_s),
                              num_owned=int(owned), info=msgpack.unpackb(info))
            if model is None or view.info.get("model") == model:
                views.append(view)
        return sorted(views, key=lambda v: (v.worker, v.incarnation))

    async def orphans(self, owner: str) -> list[tuple[str, str]]:
        """(job id, acknowledgement subject) of the jobs of an owner whose lease has lapsed."""
        return [(_text(job_id), _text(ack)) for job_id, ack in await self._call("orphans", [self._owned(owner)], owner)]

    async def bury(self, owner: str) -> bool:
        """Forget a lapsed owner; its jobs stay claimable. False: it is alive after all."""
        return bool(await self._call("bury", [self._key("workers"), self._owned(owner)], owner))

    async def lead(self, task: str, name: str, seconds: float) -> bool:
        """Become or stay the one that does `task`. Only for tasks that are harmless when two do them for a moment."""
        return bool(await self._call("lead", [self._key(f"leader:{task}")], name, int(seconds * 1000)))

    async def job(self, job_id: str) -> dict[str, str]:
        """The job's record, {} when there is none."""
        return await self.hash(f"job:{job_id}")

    async def note_desk(self, group: str, address: str) -> None:
        """Where the ranks of a group meet (desk_record.py); read by `hash("desks")`."""
        try:
            await self._redis.hset(self._key("desks"), group, address)
        except REDIS_FAILURES as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None

    async def hash(self, name: str) -> dict[str, str]:
        """A whole record by the name of its key, {} when there is none."""
        try:
            record = await self._redis.hgetall(self._key(name))
        except REDIS_FAILURES as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None
        return {_text(k): _text(v) for k, v in record.items()}

    async def hash_fields(self, name: str, fields: Sequence[bytes]) -> list[bytes | None]:
        """Some fields of a record by the name of its key."""
        try:
            found: list[bytes | None] = await self._redis.hmget(self._key(name), list(fields))
        except REDIS_FAILURES as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None
        return found

    async def script(self, name: str, key_names: list[str], *args: Any) -> Any:
        """Run one of the scripts for the modules beside this one (batch_store.py)."""
        return await self._call(name, [self._key(key) for key in key_names], *args)

    async def _call(self, script: str, keys: list[str], *args: Any) -> Any:
        try:
            return await self._scripts[script](keys=[self._key("meta"), self._key("leases"), *keys], args=[self._lease_ms, *args])
        except REDIS_FAILURES as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None

    @staticmethod
    def _key(name: str) -> str:
        return PREFIX + name

    @staticmethod
    def _job(job_id: str) -> str:
        return f"{PREFIX}job:{job_id}"

    @staticmethod
    def _owned(owner: str) -> str:
        return f"{PREFIX}owned:{owner}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
