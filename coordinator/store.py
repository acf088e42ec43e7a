"""Who is alive and who owns which job: the only module that speaks Redis.

Every change is one Lua script, atomic and fenced by (epoch, owner); docs/protocol.md has the rules and what each field is for. All keys
share one hash tag, so that they live in one slot of a cluster. Time is the server's (TIME), never a client's clock.

    {tokenmill}:meta            hash   run, era, grace_until, jobs_floor, incarnation, seen, hold_until
    {tokenmill}:leases          hash   "worker.incarnation" -> expiry, ms
    {tokenmill}:workers         hash   "worker.incarnation" -> msgpack of what the worker says of itself
    {tokenmill}:job:<id>        hash   state, epoch, owner, era, is_swept, chains, unfenced, ack, origin, model, cancelled, taken
    {tokenmill}:owned:<owner>   set    job ids, so that a dead owner's jobs are found
    {tokenmill}:open            hash   job id -> "class tokens admitted_ms tenant" of what was admitted and is not over
    {tokenmill}:load, :tenants  hash   sums over `open`: tokens by class, jobs and tokens by tenant
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from coordinator.errors import QueueFull, Unavailable

log = logging.getLogger(__name__)

PREFIX = "{tokenmill}:"
LEASE_S = 5.0
JOB_TTL_S = 24 * 3600
DONE_TTL_S = 3600
SOCKET_TIMEOUT_S = 1.0

# Head of every script: the server's clock, and the era. Another server process (restart, failover, restore) or missing meta data means
# that anything may have been lost: a new era begins, in whose first lease (grace) living owners say again what they own. A Redis that
# heard nobody for half a lease was itself away (owners renew five times a lease): leases did not lapse for lack of life, so nobody is
# condemned for another lease. That is a hold and no grace: nothing was lost, so nobody asserts.
_HEAD = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta, leases = KEYS[1], KEYS[2]
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local m = redis.call('HMGET', meta, 'run', 'era', 'grace_until', 'jobs_floor', 'seen', 'hold_until')
local era, grace_until, floor, silence = m[2], tonumber(m[3] or '0'), m[4], now - tonumber(m[5] or '0')
local hold_until = tonumber(m[6] or '0')
if m[1] ~= run then
  era, grace_until, floor = run .. ':' .. string.format('%.0f', now), now + tonumber(ARGV[1]), false
  redis.call('HSET', meta, 'run', run, 'era', era, 'grace_until', string.format('%.0f', grace_until))
  redis.call('HDEL', meta, 'jobs_floor')
  redis.call('DEL', leases)
elseif m[5] and silence > ARGV[1] / 2 then
  hold_until = now + tonumber(ARGV[1])
  redis.call('HSET', meta, 'hold_until', string.format('%.0f', hold_until))
end
hold_until = math.max(hold_until, grace_until)
if not m[5] or silence > ARGV[1] / 10 then redis.call('HSET', meta, 'seen', string.format('%.0f', now)) end
local function int(n) return string.format('%.0f', n) end
local function lives(owner)
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

# ARGV: lease_ms. A brand-new farm (its JOBS stream was made just now) has no former owners: no grace, every job is younger than the era.
_FOUND = """
redis.call('HSET', meta, 'grace_until', 0, 'jobs_floor', 0)
return 1
"""

# ARGV: lease_ms era seq
_FLOOR = """
if era == ARGV[2] and not floor then redis.call('HSET', meta, 'jobs_floor', ARGV[3]) end
return 1
"""

# KEYS: .. workers. ARGV: lease_ms worker info
_REGISTER = """
local incarnation = math.max(tonumber(redis.call('HGET', meta, 'incarnation') or '0') + 1, now)
local owner = ARGV[2] .. '.' .. int(incarnation)
redis.call('HSET', meta, 'incarnation', int(incarnation))
redis.call('HSET', leases, owner, int(now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], owner, ARGV[3])
return {int(incarnation), floor and '' or era}
"""

# KEYS: .. workers. ARGV: lease_ms owner info
_RENEW = """
if redis.call('HEXISTS', leases, ARGV[2]) == 1 then
  redis.call('HSET', leases, ARGV[2], int(now + tonumber(ARGV[1])))
  redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
  return 'ok'
end
return now < grace_until and 'assert' or 'over'
"""

# KEYS: .. job owned. ARGV: lease_ms owner job ack origin model seq ttl roster_era roster
_CLAIM = """
local me, id, job = ARGV[2], ARGV[3], KEYS[3]
if not lives(me) then return {'lapsed'} end
local need_floor = floor and '' or era
local f = redis.call('HMGET', job, 'state', 'epoch', 'owner', 'era', 'is_swept', 'chains', 'unfenced', 'cancelled', 'taken',
  'crashes', 'on_trial', 'trial_deaths', 'trial_crashes')
local owner, chains, unfenced, taken, is_swept = '', '', '', 0, false
local trial_deaths = tonumber(f[12] or '0')
if f[4] == era then
  if f[1] == 'done' then return {'done'} end
  owner, chains, unfenced, taken, is_swept = f[3] or '', f[6] or '', f[7] or '', tonumber(f[9] or '0'), f[5] == '1'
  if owner ~= '' and owner ~= me and lives(owner) then return {'owned', owner} end
elseif floor and tonumber(ARGV[7]) > tonumber(floor) then
  is_swept = true
end
local must_condemn = owner ~= '' and owner ~= me
if must_condemn and now < hold_until then return {'wait', int(hold_until - now), need_floor} end
if not is_swept and now < grace_until then return {'wait', int(grace_until - now), need_floor} end
if not is_swept then
  if ARGV[9] ~= era then return {'need_roster', era, need_floor} end
  for _, o in ipairs(words(ARGV[10])) do
    -- A lapsed owner has an entry and may renew: it is no concern of this job. Only those without one can never come back.
    if o ~= me and redis.call('HEXISTS', leases, o) == 0 then unfenced = with(unfenced, o) end
    chains = with(chains, o)
  end
end
if must_condemn then
  redis.call('HDEL', leases, owner)
  redis.call('SREM', '{tokenmill}:owned:' .. owner, id)
  unfenced = with(unfenced, owner)
  taken = taken + 1
  if f[11] == '1' then trial_deaths = trial_deaths + 1 end
end
unfenced = without(unfenced, me)
local epoch = math.max(tonumber(f[2] or '0') + 1, now)
redis.call('HSET', job, 'state', 'owned', 'epoch', int(epoch), 'owner', me, 'era', era, 'is_swept', '1', 'chains', with(chains, me),
  'unfenced', unfenced, 'ack', ARGV[4], 'origin', ARGV[5], 'model', ARGV[6], 'taken', taken, 'trial_deaths', trial_deaths,
  'on_trial', '0')
redis.call('EXPIRE', job, ARGV[8])
redis.call('SADD', KEYS[4], id)
return {'granted', int(epoch), without(chains, me), unfenced, f[8] or '', need_floor,
  tostring(taken), f[10] or '0', tostring(trial_deaths), f[13] or '0'}
"""

# KEYS: .. job. ARGV: lease_ms fenced_owner. A tombstone is a fact for ever: no question who says so.
_FENCED = """
local unfenced = redis.call('HGET', KEYS[3], 'unfenced')
if unfenced then redis.call('HSET', KEYS[3], 'unfenced', without(unfenced, ARGV[2])) end
return 1
"""

# KEYS: .. job owned_giver owned_taker. ARGV: lease_ms giver epoch taker job
_TAKE = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state', 'chains', 'cancelled', 'era', 'is_swept')
if f[6] ~= era or f[3] ~= 'owned' then return {'void'} end
if f[1] == ARGV[4] and tonumber(f[2]) == tonumber(ARGV[3]) + 1 then return {'taken', f[5] or ''} end  -- the first reply was lost
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] or f[7] ~= '1' then return {'void'} end
if not lives(ARGV[4]) then return {'lapsed'} end  -- not void: somebody else may take it
redis.call('HSET', KEYS[3], 'owner', ARGV[4], 'epoch', int(tonumber(f[2]) + 1), 'chains', with(f[4], ARGV[4]))
redis.call('SREM', KEYS[4], ARGV[5])
redis.call('SADD', KEYS[5], ARGV[5])
return {'taken', f[5] or ''}
"""

# KEYS: .. job. ARGV: lease_ms owner epoch. A new epoch for the same owner: handles that are out are void from here on.
_TAKE_BACK = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state', 'era', 'is_swept')
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] or f[3] ~= 'owned' or f[4] ~= era or f[5] ~= '1' then return '0' end
local epoch = int(tonumber(f[2]) + 1)
redis.call('HSET', KEYS[3], 'epoch', epoch)
return epoch
"""

# KEYS: .. open load tenants job. ARGV: lease_ms job class tokens tenant max_class_tokens max_tenant_jobs max_tenant_tokens (0: none)
#   origin prompt_tokens ttl is_named. The job's record gets what a reader at another shim needs; without an era it is missing for claims.
# Open work is what was admitted and has no final record. Above half of a class' bound, no tenant may hold more than its share.
_ADMIT = """
local id, klass, tokens, tenant = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local most, most_jobs, most_tokens = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
if redis.call('HEXISTS', KEYS[3], id) == 1 then return {'known', '0'} end
if ARGV[12] == '1' and redis.call('HEXISTS', KEYS[6], 'origin') == 1 then return {'known', '0'} end
-- Counted in beside its publish, it may be over by now.
if redis.call('HGET', KEYS[6], 'state') == 'done' then return {'ok', '0'} end
local queued = tonumber(redis.call('HGET', KEYS[4], klass) or '0') + tokens
local jobs = tonumber(redis.call('HGET', KEYS[4], 'jobs ' .. tenant) or '0') + 1
local held = tonumber(redis.call('HGET', KEYS[5], tenant) or '0') + tokens
if most_jobs > 0 and jobs > most_jobs then return {'tenant_jobs', tostring(most_jobs)} end
if most_tokens > 0 and held > most_tokens then return {'tenant_tokens', tostring(most_tokens)} end
if most > 0 and queued > most and queued > tokens then return {'class_tokens', tostring(most)} end
local num_tenants = redis.call('HLEN', KEYS[5]) + (held == tokens and 1 or 0)
if most > 0 and queued * 2 > most and num_tenants > 1 and held > most / num_tenants then
  return {'tenant_share', int(most / num_tenants)}
end
redis.call('HSET', KEYS[3], id, klass .. ' ' .. int(tokens) .. ' ' .. int(now) .. ' ' .. tenant)
redis.call('HINCRBY', KEYS[4], klass, tokens)
redis.call('HINCRBY', KEYS[4], 'jobs ' .. tenant, 1)
redis.call('HINCRBY', KEYS[5], tenant, tokens)
redis.call('HSET', KEYS[6], 'origin', ARGV[9], 'prompt_tokens', ARGV[10])
redis.call('EXPIRE', KEYS[6], ARGV[11])
return {'ok', int(queued)}
"""

# KEYS: .. job. ARGV: lease_ms reader
_READER = """
if redis.call('EXISTS', KEYS[3]) == 1 then redis.call('HSET', KEYS[3], 'reader', ARGV[2]) end
return 1
"""

# KEYS: .. open. ARGV: lease_ms max_age_ms. Ids of what was admitted so long ago that it is over: its producer died before it published.
_STALE = """
local stale = {}
local entries = redis.call('HGETALL', KEYS[3])
for i = 1, #entries, 2 do
  local at = tonumber(string.match(entries[i + 1], '^%S+ %d+ (%d+)'))
  if now - at > tonumber(ARGV[2]) then stale[#stale + 1] = entries[i] end
end
return stale
"""

# Takes `id` out of the open work.
_COUNT_OUT = """
local entry = redis.call('HGET', '{tokenmill}:open', id)
if entry then
  local load, tenants = '{tokenmill}:load', '{tokenmill}:tenants'
  local klass, tokens, tenant = string.match(entry, '^(%S+) (%d+) %d+ (.*)$')
  redis.call('HDEL', '{tokenmill}:open', id)
  redis.call('HINCRBY', load, klass, -tokens)
  redis.call('HINCRBY', load, 'jobs ' .. tenant, -1)
  if redis.call('HINCRBY', tenants, tenant, -tokens) <= 0 then redis.call('HDEL', tenants, tenant) end
  if tonumber(redis.call('HGET', load, 'jobs ' .. tenant)) <= 0 then redis.call('HDEL', load, 'jobs ' .. tenant) end
end
"""

# KEYS: .. job. ARGV: lease_ms job. The record goes too if nobody ever claimed it.
_DISCHARGE = "local id = ARGV[2]" + _COUNT_OUT + """
if redis.call('HEXISTS', KEYS[3], 'state') == 0 then redis.call('DEL', KEYS[3]) end
return 1
"""

# KEYS: .. job owned. ARGV: lease_ms owner job done_ttl. For anyone who has seen the final record, whatever the record says.
_FINISH = "local id = ARGV[3]" + _COUNT_OUT + """
local owner = redis.call('HGET', KEYS[3], 'owner')
if owner and owner ~= '' then redis.call('SREM', '{tokenmill}:owned:' .. owner, ARGV[3]) end
redis.call('SREM', KEYS[4], ARGV[3])
redis.call('HSET', KEYS[3], 'state', 'done', 'owner', '', 'unfenced', '', 'era', era)
redis.call('EXPIRE', KEYS[3], ARGV[4])
return 1
"""

# KEYS: .. job. ARGV: lease_ms owner epoch. From here on a death counts as this job's doing.
_TRY = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch')
if f[1] == ARGV[2] and f[2] == ARGV[3] then redis.call('HSET', KEYS[3], 'on_trial', '1') end
return 1
"""

# KEYS: .. job owned. ARGV: lease_ms owner epoch job blame. Only when every own frame of the job was answered.
_GIVE_UP = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state', 'era')
if f[1] ~= ARGV[2] or f[2] ~= ARGV[3] or f[3] ~= 'owned' or f[4] ~= era then return 0 end
redis.call('SREM', KEYS[4], ARGV[4])
local on_trial = redis.call('HGET', KEYS[3], 'on_trial') == '1'
if ARGV[5] == 'crash' then redis.call('HINCRBY', KEYS[3], on_trial and 'trial_crashes' or 'crashes', 1) end
if ARGV[5] == 'death' then redis.call('HINCRBY', KEYS[3], on_trial and 'trial_deaths' or 'taken', 1) end
redis.call('HSET', KEYS[3], 'owner', '', 'state', 'queued', 'on_trial', '0')
return 1
"""

# KEYS: .. workers owned. ARGV: lease_ms owner info ttl, then per job: id epoch ack origin model chains.
# Only in grace. Replies with the ids that another owner holds under a later epoch.
_ASSERT = """
local me, lost = ARGV[2], {}
if now >= grace_until then return {'over'} end
redis.call('DEL', KEYS[4])  -- what an older Redis remembered: a job that was finished in the lost second is not asserted
for i = 5, #ARGV, 6 do
  local id, epoch = ARGV[i], tonumber(ARGV[i + 1])
  local job = '{tokenmill}:job:' .. id
  local f = redis.call('HMGET', job, 'owner', 'epoch', 'state', 'era', 'unfenced')
  local known, owner, unfenced = tonumber(f[2] or '0'), f[1] or '', f[5] or ''
  if f[4] == era and (f[3] == 'done' or known > epoch or (known == epoch and owner ~= me)) then
    if f[3] ~= 'done' then redis.call('HSET', job, 'unfenced', with(unfenced, me)) end
    lost[#lost + 1] = id
  else
    if f[4] ~= era then unfenced = '' end
    if f[4] == era and owner ~= '' and owner ~= me then
      unfenced = with(unfenced, owner)
      redis.call('SREM', '{tokenmill}:owned:' .. owner, id)
    end
    redis.call('HSET', job, 'state', 'owned', 'epoch', ARGV[i + 1], 'owner', me, 'era', era, 'is_swept', '0', 'ack', ARGV[i + 2],
      'origin', ARGV[i + 3], 'model', ARGV[i + 4], 'chains', ARGV[i + 5], 'unfenced', without(unfenced, me))
    redis.call('EXPIRE', job, ARGV[4])
    redis.call('SADD', KEYS[4], id)
  end
end
redis.call('HSET', leases, me, int(now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], me, ARGV[3])
return {'ok', unpack(lost)}
"""

# KEYS: .. workers. ARGV: lease_ms owner
_RETIRE = """
redis.call('HDEL', leases, ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return 1
"""

# KEYS: .. owned. ARGV: lease_ms owner. (job id, ack subject) of what a lapsed owner holds; nothing of a living one, or in grace.
_ORPHANS = """
if lives(ARGV[2]) or now < hold_until then return {} end
local found = {}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local f = redis.call('HMGET', '{tokenmill}:job:' .. id, 'owner', 'ack', 'state')
  if f[1] == ARGV[2] and f[2] and f[3] == 'owned' then found[#found + 1] = {id, f[2]} end
end
return found
"""

# KEYS: .. workers owned. ARGV: lease_ms owner. Condemns. Job records keep naming the dead owner: its chain is still to be fenced.
_BURY = """
if lives(ARGV[2]) or now < hold_until then return 0 end
redis.call('HDEL', leases, ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[4])
return 1
"""

# KEYS: .. leader. ARGV: lease_ms name leader_ms
_LEAD = """
local leader = redis.call('GET', KEYS[3])
if leader and leader ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
return 1
"""

# KEYS: .. job. ARGV: lease_ms ttl. A job that nobody claimed yet gets a record with nothing but the flag (no era: it counts as missing).
_CANCEL = """
local f = redis.call('HMGET', KEYS[3], 'state', 'era')
if f[1] == 'done' and f[2] == era then return 0 end
redis.call('HSET', KEYS[3], 'cancelled', '1')
redis.call('EXPIRE', KEYS[3], ARGV[2])
return 1
"""

# KEYS: .. workers. ARGV: lease_ms
_VIEW = """
local rows = {}
local infos = redis.call('HGETALL', KEYS[3])
for i = 1, #infos, 2 do
  local expiry = tonumber(redis.call('HGET', leases, infos[i]) or '0')
  rows[#rows + 1] = {infos[i], int(expiry - now), infos[i + 1], tostring(redis.call('SCARD', '{tokenmill}:owned:' .. infos[i]))}
end
return rows
"""

_SCRIPTS = {
    "found": _FOUND, "floor": _FLOOR, "register": _REGISTER, "renew": _RENEW, "claim": _CLAIM, "fenced": _FENCED, "take": _TAKE,
    "take_back": _TAKE_BACK, "finish": _FINISH, "give_up": _GIVE_UP, "try": _TRY, "admit": _ADMIT, "reader": _READER, "stale": _STALE,
    "discharge": _DISCHARGE, "assert": _ASSERT, "retire": _RETIRE, "orphans": _ORPHANS,
    "bury": _BURY, "lead": _LEAD, "cancel": _CANCEL, "view": _VIEW,
}

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
        except (TimeoutError, RedisError, OSError) as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None

    async def found(self) -> None:
        """This farm is brand new: no owner can be out there, so nobody has to wait for one."""
        await self._call("found", [])

    async def set_floor(self, era: str, seq: int) -> None:
        """JOBS ended at `seq` when this era was young: younger jobs can have no owner of an earlier era."""
        await self._call("floor", [], era, seq)

    async def register(self, worker: str, info: dict[str, Any]) -> tuple[int, str]:
        """A new incarnation of `worker`, alive for one lease: (its number, larger than any before; era whose floor is not known, or "").

        It must stand on the roster before its first claim.
        """
        incarnation, floor_era = await self._call("register", [self._key("workers")], worker, msgpack.packb(info))
        return int(incarnation), _text(floor_era)

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
        """A new epoch for the owner itself: its handle that is out becomes void. None: the job is not ours any more."""
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
            limits.max_tenant_tokens, job.origin, job.prompt_tokens, JOB_TTL_S, int(job.is_named))
        tenant, klass = job.tenant, job.klass
        match _text(state):
            case "known":
                return None
            case "tenant_jobs":
                raise QueueFull(f"of tenant {tenant or '(none)'} ({_text(bound[0])} open jobs)")
            case "tenant_tokens" | "tenant_share":
                raise QueueFull(f"of tenant {tenant or '(none)'} ({_text(bound[0])} open tokens)")
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
        try:
            record = await self._redis.hgetall(self._job(job_id))
        except (TimeoutError, RedisError, OSError) as error:
            raise Unavailable(f"Redis at {self.url}: {error}") from None
        return {_text(k): _text(v) for k, v in record.items()}

    async def _call(self, script: str, keys: list[str], *args: Any) -> Any:
        try:
            return await self._scripts[script](keys=[self._key("meta"), self._key("leases"), *keys], args=[self._lease_ms, *args])
        except (TimeoutError, RedisError, OSError) as error:
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
