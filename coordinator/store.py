"""Who is alive and who owns which job: the only module that speaks Redis.

Every change is one Lua script, atomic and fenced by (epoch, incarnation); the rules are docs/protocol.md. All keys share one hash
tag, so that they live in one slot of a cluster. Time is the server's (TIME), never a client's clock.

    {tokenmill}:meta            hash   run (the server process that wrote last), grace_until, incarnation, nonce
    {tokenmill}:leases          hash   "worker.incarnation" -> expiry, ms
    {tokenmill}:workers         hash   "worker.incarnation" -> msgpack of what the worker says of itself
    {tokenmill}:job:<id>        hash   state, epoch, owner, ack, origin, model, chains, unfenced, taken, cancelled
    {tokenmill}:owned:<owner>   set    job ids, so that a dead owner's jobs are found
"""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from coordinator.errors import Unavailable

log = logging.getLogger(__name__)

PREFIX = "{tokenmill}:"
LEASE_S = 5.0
JOB_TTL_S = 24 * 3600
DONE_TTL_S = 3600
SOCKET_TIMEOUT_S = 1.0

# Shared head of every script: the server's clock, and the grace after a Redis that came back empty or from an older file.
# Nobody claims before one full lease has passed then, so that owners can say again what they own.
_HEAD = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta, leases = KEYS[1], KEYS[2]
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
if redis.call('HGET', meta, 'run') ~= run then
  redis.call('HSET', meta, 'run', run, 'grace_until', now + tonumber(ARGV[1]))
end
local function alive(owner)
  local expiry = redis.call('HGET', leases, owner)
  return expiry and tonumber(expiry) > now
end
local function words(text)
  local list = {}
  for word in string.gmatch(text or '', '%S+') do list[#list + 1] = word end
  return list
end
local function with(text, word)
  for _, w in ipairs(words(text)) do if w == word then return text end end
  return (text and text ~= '') and (text .. ' ' .. word) or word
end
local function without(text, word)
  local list = {}
  for _, w in ipairs(words(text)) do if w ~= word then list[#list + 1] = w end end
  return table.concat(list, ' ')
end
"""

# KEYS: meta leases. ARGV: lease_ms. A brand-new farm (its JOBS stream was made just now) has no former owners: no grace.
_FOUND = """
redis.call('HSET', meta, 'run', run, 'grace_until', 0)
return 1
"""

# KEYS: meta leases workers. ARGV: lease_ms worker info. Incarnations only grow, also over an emptied Redis.
_REGISTER = """
local last = tonumber(redis.call('HGET', meta, 'incarnation') or '0')
local incarnation = math.max(now, last + 1)
local owner = ARGV[2] .. '.' .. string.format('%.0f', incarnation)
redis.call('HSET', meta, 'incarnation', string.format('%.0f', incarnation))
redis.call('HSET', leases, owner, string.format('%.0f', now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], owner, ARGV[3])
return string.format('%.0f', incarnation)
"""

# KEYS: meta leases workers. ARGV: lease_ms owner info. 0: the lease is not there any more (lapsed and reaped, or Redis was emptied).
_RENEW = """
if redis.call('HEXISTS', leases, ARGV[2]) == 0 then return {0, run} end
redis.call('HSET', leases, ARGV[2], string.format('%.0f', now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return {1, run}
"""

# KEYS: meta leases job owned. ARGV: lease_ms owner job ack origin model epoch_seen job_ttl
# An owner that claims its own job again (the reply to its first claim was lost) gets it, under a new epoch.
_CLAIM = """
local me, job = ARGV[2], KEYS[3]
if not alive(me) then return {'lapsed'} end
local grace = tonumber(redis.call('HGET', meta, 'grace_until') or '0') - now
local f = redis.call('HMGET', job, 'state', 'epoch', 'owner', 'chains', 'unfenced', 'cancelled', 'taken')
local state, owner = f[1], f[3] or ''
if state == 'done' then return {'done'} end
if owner ~= '' and owner ~= me and alive(owner) then return {'owned', owner} end
if grace > 0 then return {'wait', tostring(grace)} end
local epoch = math.max(tonumber(f[2] or '0'), tonumber(ARGV[7])) + 1
local unfenced = f[5] or ''
local taken = tonumber(f[7] or '0')
if owner ~= '' and owner ~= me then
  unfenced = with(unfenced, owner)
  taken = taken + 1
  redis.call('SREM', '{tokenmill}:owned:' .. owner, ARGV[3])
end
local chains = f[4] or ''
redis.call('HSET', job, 'state', 'owned', 'epoch', epoch, 'owner', me, 'ack', ARGV[4], 'origin', ARGV[5], 'model', ARGV[6],
  'chains', with(chains, me), 'unfenced', unfenced, 'taken', taken)
redis.call('EXPIRE', job, ARGV[8])
redis.call('SADD', KEYS[4], ARGV[3])
return {'granted', tostring(epoch), chains, unfenced, f[6] or '', tostring(taken), owner}
"""

# KEYS: meta leases job. ARGV: lease_ms owner epoch fenced_owner
_FENCED = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'unfenced')
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[3], 'unfenced', without(f[3], ARGV[4]))
return 1
"""

# KEYS: meta leases job owned_giver owned_taker. ARGV: lease_ms giver epoch taker job
_TAKE = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state', 'chains', 'cancelled')
if f[1] == ARGV[4] and f[2] == ARGV[3] then return {'taken', f[5] or ''} end  -- our own retry: the first reply was lost
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] or f[3] ~= 'owned' then return {'refused'} end
if not alive(ARGV[4]) then return {'lapsed'} end
redis.call('HSET', KEYS[3], 'owner', ARGV[4], 'chains', with(f[4], ARGV[4]))
redis.call('SREM', KEYS[4], ARGV[5])
redis.call('SADD', KEYS[5], ARGV[5])
return {'taken', f[5] or ''}
"""

# KEYS: meta leases job. ARGV: lease_ms owner epoch. A new epoch for the same owner: handles that are out are void from here on.
_TAKE_BACK = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state')
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] or f[3] ~= 'owned' then return 0 end
return redis.call('HINCRBY', KEYS[3], 'epoch', 1)
"""

# KEYS: meta leases job owned. ARGV: lease_ms owner epoch job done_ttl
_FINISH = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch')
redis.call('SREM', KEYS[4], ARGV[4])
if f[1] and (f[1] ~= ARGV[2] or f[2] ~= ARGV[3]) then
  redis.call('SREM', '{tokenmill}:owned:' .. f[1], ARGV[4])
end
redis.call('HSET', KEYS[3], 'state', 'done', 'owner', '')
redis.call('EXPIRE', KEYS[3], ARGV[5])
return 1
"""

# KEYS: meta leases job owned. ARGV: lease_ms owner epoch job. Only for a job that was put back into the queue unharmed.
_GIVE_UP = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch')
redis.call('SREM', KEYS[4], ARGV[4])
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] then return 0 end
redis.call('HSET', KEYS[3], 'owner', '', 'state', 'queued')
return 1
"""

# KEYS: meta leases workers owned. ARGV: lease_ms owner info ttl, then per job: id epoch ack origin model chains.
# Says again what this incarnation owns. The reply names the jobs that are somebody else's (or over) by now.
_REASSERT = """
local me, lost = ARGV[2], {}
redis.call('HSET', leases, me, string.format('%.0f', now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], me, ARGV[3])
for i = 5, #ARGV, 6 do
  local id, epoch = ARGV[i], tonumber(ARGV[i + 1])
  local job = '{tokenmill}:job:' .. id
  local f = redis.call('HMGET', job, 'owner', 'epoch', 'state', 'chains')
  local known = tonumber(f[2] or '0')
  if f[3] == 'done' or known > epoch or (known == epoch and f[1] ~= me and f[1] ~= '' and alive(f[1])) then
    lost[#lost + 1] = id
  else
    local chains = f[4] or ''
    for _, c in ipairs(words(ARGV[i + 5])) do chains = with(chains, c) end
    redis.call('HSET', job, 'state', 'owned', 'epoch', epoch, 'owner', me, 'ack', ARGV[i + 2], 'origin', ARGV[i + 3],
      'model', ARGV[i + 4], 'chains', chains)
    redis.call('EXPIRE', job, ARGV[4])
    redis.call('SADD', KEYS[4], id)
  end
end
return lost
"""

# KEYS: meta leases workers owned. ARGV: lease_ms owner
_RETIRE = """
redis.call('HDEL', leases, ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
if redis.call('SCARD', KEYS[4]) == 0 then redis.call('DEL', KEYS[4]) end
return 1
"""

# KEYS: meta leases owned. ARGV: lease_ms owner. Acknowledgement subjects of what a lapsed owner held; nothing of a living one, or in grace.
_ORPHANS = """
if alive(ARGV[2]) or tonumber(redis.call('HGET', meta, 'grace_until') or '0') > now then return {} end
local acks = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local f = redis.call('HMGET', '{tokenmill}:job:' .. id, 'owner', 'ack', 'state')
  if f[1] == ARGV[2] and f[2] and f[3] ~= 'done' then acks[#acks + 1] = f[2] end
end
return acks
"""

# KEYS: meta leases workers owned. ARGV: lease_ms owner. Job records keep naming the dead owner: its chain is still to be fenced.
_BURY = """
if alive(ARGV[2]) or tonumber(redis.call('HGET', meta, 'grace_until') or '0') > now then return 0 end
redis.call('HDEL', leases, ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[4])
return 1
"""

# KEYS: meta leases leader. ARGV: lease_ms name leader_ms
_LEAD = """
local leader = redis.call('GET', KEYS[3])
if leader and leader ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS: meta leases job. ARGV: lease_ms ttl
_CANCEL = """
if redis.call('HGET', KEYS[3], 'state') == 'done' then return 0 end
redis.call('HSET', KEYS[3], 'cancelled', '1')
redis.call('EXPIRE', KEYS[3], ARGV[2])
return 1
"""

# KEYS: meta leases workers. ARGV: lease_ms
_VIEW = """
local rows = {}
local infos = redis.call('HGETALL', KEYS[3])
for i = 1, #infos, 2 do
  local expiry = tonumber(redis.call('HGET', leases, infos[i]) or '0')
  rows[#rows + 1] = {infos[i], string.format('%.0f', expiry - now), infos[i + 1], tostring(redis.call('SCARD', '{tokenmill}:owned:' .. infos[i]))}
end
return rows
"""

_SCRIPTS = {
    "found": _FOUND, "register": _REGISTER, "renew": _RENEW, "claim": _CLAIM, "fenced": _FENCED, "take": _TAKE, "take_back": _TAKE_BACK,
    "finish": _FINISH, "give_up": _GIVE_UP, "reassert": _REASSERT, "retire": _RETIRE, "cancel": _CANCEL, "view": _VIEW,
    "orphans": _ORPHANS, "bury": _BURY, "lead": _LEAD,
}

ClaimState = Literal["granted", "owned", "done", "wait", "lapsed"]


def owner_name(worker: str, incarnation: int) -> str:
    """One incarnation of a worker, as Redis and the chains name it."""
    return f"{worker}.{incarnation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The answer to a claim. `chains` and `unfenced` are owners ("worker.incarnation"): where frames may stand, whom to fence first."""

    state: ClaimState
    epoch: int = 0
    chains: tuple[str, ...] = ()
    unfenced: tuple[str, ...] = ()
    is_cancelled: bool = False
    times_taken: int = 0        # from how many owners the job was taken because they died
    wait_s: float = 0.0


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
        self.url = url
        self.lease_s = lease_s
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=32, timeout=5, socket_timeout=SOCKET_TIMEOUT_S,
                                                     socket_connect_timeout=SOCKET_TIMEOUT_S, retry=Retry(NoBackoff(), 0))
        self._redis = redis.Redis(connection_pool=pool)
        self._scripts = {name: self._redis.register_script(_HEAD + body) for name, body in _SCRIPTS.items()}
        self._lease_ms = str(int(lease_s * 1000))

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def ping(self) -> None:
        try:
            await self._redis.ping()
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None

    async def found(self) -> None:
        """This farm is brand new: no owner can be out there, so nobody has to wait for one."""
        await self._call("found", [])

    async def register(self, worker: str, info: dict[str, Any]) -> int:
        """A new incarnation of `worker`, alive for one lease. Returns its number, larger than any before."""
        return int(await self._call("register", [self._key("workers")], worker, msgpack.packb(info)))

    async def renew(self, owner: str, info: dict[str, Any]) -> tuple[bool, str]:
        """(still registered, id of the Redis process). A changed id: Redis restarted, so assert what is owned."""
        valid, run = await self._call("renew", [self._key("workers")], owner, msgpack.packb(info))
        return bool(valid), _text(run)

    async def retire(self, owner: str) -> None:
        await self._call("retire", [self._key("workers"), self._owned(owner)], owner)

    async def claim(self, owner: str, job_id: str, *, ack: str, origin: str, model: str, epoch_seen: int = 0) -> Claim:
        """Become the owner of a job that nobody else alive owns. `epoch_seen`: the highest epoch found on its chains (0: not looked).

        Call it only for a job that this incarnation does not hold: its own claim is granted again.
        """
        reply = [_text(part) for part in await self._call(
            "claim", [self._job(job_id), self._owned(owner)], owner, job_id, ack, origin, model, epoch_seen, JOB_TTL_S)]
        if reply[0] == "granted":
            return Claim(state="granted", epoch=int(reply[1]), chains=tuple(reply[2].split()), unfenced=tuple(reply[3].split()),
                         is_cancelled=reply[4] == "1", times_taken=int(reply[5]))
        if reply[0] == "wait":
            return Claim(state="wait", wait_s=float(reply[1]) / 1000)
        return Claim(state=reply[0])  # type: ignore[arg-type]

    async def fenced(self, owner: str, job_id: str, epoch: int, fenced_owner: str) -> bool:
        """Note that a tombstone stands on that former owner's chain. False: the job is not ours any more."""
        return bool(await self._call("fenced", [self._job(job_id)], owner, epoch, fenced_owner))

    async def take(self, job_id: str, epoch: int, *, giver: str, taker: str) -> tuple[bool, bool]:
        """Hand-over by compare-and-set: (taken, cancelled)."""
        reply = await self._call("take", [self._job(job_id), self._owned(giver), self._owned(taker)], giver, epoch, taker, job_id)
        return _text(reply[0]) == "taken", len(reply) > 1 and _text(reply[1]) == "1"

    async def take_back(self, owner: str, job_id: str, epoch: int) -> int | None:
        """A new epoch for the owner itself: its handle that is out becomes void. None: a decode worker was faster."""
        return int(await self._call("take_back", [self._job(job_id)], owner, epoch)) or None

    async def finish(self, owner: str, job_id: str, epoch: int) -> None:
        """The final record stands and the message is acknowledged."""
        await self._call("finish", [self._job(job_id), self._owned(owner)], owner, epoch, job_id, DONE_TTL_S)

    async def give_up(self, owner: str, job_id: str, epoch: int) -> bool:
        """Stop owning a job that emitted nothing here and goes back into the queue."""
        return bool(await self._call("give_up", [self._job(job_id), self._owned(owner)], owner, epoch, job_id))

    async def reassert(self, owner: str, info: dict[str, Any], jobs: Iterable[OwnedJob]) -> set[str]:
        """Say again what we own, after Redis came back. Returns the job ids that are not ours any more."""
        flat: list[str | int] = []
        for job in jobs:
            flat += [job.job_id, job.epoch, job.ack, job.origin, job.model, " ".join(job.chains)]
        lost = await self._call("reassert", [self._key("workers"), self._owned(owner)], owner, msgpack.packb(info), JOB_TTL_S, *flat)
        return {_text(job_id) for job_id in lost}

    async def cancel(self, job_id: str) -> bool:
        """Remember that a job is to be cancelled, for whoever pulls it. False: it is over already."""
        return bool(await self._call("cancel", [self._job(job_id)], JOB_TTL_S))

    async def orphans(self, owner: str) -> list[str]:
        """Acknowledgement subjects of the jobs of an owner whose lease has lapsed."""
        return [_text(ack) for ack in await self._call("orphans", [self._owned(owner)], owner)]

    async def bury(self, owner: str) -> bool:
        """Forget a lapsed owner; its jobs stay claimable. False: it is alive after all."""
        return bool(await self._call("bury", [self._key("workers"), self._owned(owner)], owner))

    async def lead(self, task: str, name: str, seconds: float) -> bool:
        """Become or stay the one that does `task`. Only for tasks that are harmless when two do them for a moment."""
        return bool(await self._call("lead", [self._key(f"leader:{task}")], name, int(seconds * 1000)))

    async def workers(self, model: str | None = None) -> list[WorkerView]:
        """Every registered incarnation, the lapsed ones too until they are reaped."""
        views = []
        for name, left_ms, info, owned in await self._call("view", [self._key("workers")]):
            worker, _, incarnation = _text(name).rpartition(".")
            left_s = float(left_ms) / 1000
            view = WorkerView(worker=worker, incarnation=int(incarnation), is_alive=left_s > 0, expires_in_s=left_s, num_owned=int(owned),
                              info=msgpack.unpackb(info))
            if model is None or view.info.get("model") == model:
                views.append(view)
        return sorted(views, key=lambda v: (v.worker, v.incarnation))

    async def job(self, job_id: str) -> dict[str, str]:
        """The job's record, {} when there is none."""
        try:
            record = await self._redis.hgetall(self._job(job_id))
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None
        return {_text(k): _text(v) for k, v in record.items()}

    async def _call(self, script: str, keys: list[str], *args: Any) -> Any:
        try:
            return await self._scripts[script](keys=[self._key("meta"), self._key("leases"), *keys], args=[self._lease_ms, *args])
        except (RedisError, OSError, asyncio.TimeoutError) as error:
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
