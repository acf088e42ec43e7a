"""The Lua scripts of store.py: each one transition of docs/protocol.md, atomic. Nothing else writes these keys.

Every script gets KEYS {meta, leases, …} and ARGV {lease in ms, …}; the comment above each names the rest.
"""

from coordinator.answer_scripts import ANSWER_SCRIPTS
from coordinator.batch_scripts import BATCH_SCRIPTS
from coordinator.prefix_scripts import PREFIX_SCRIPTS
from coordinator.view_scripts import VIEW_SCRIPTS

# Head of every script: the server's clock, and the era. Another server process (restart, failover, restore) or missing meta data means
# that anything may have been lost: a new era begins, in whose first lease (grace) living owners say again what they own. A Redis that
# heard nobody for half a lease was itself away (owners renew five times a lease): leases did not lapse for lack of life, so nobody is
# condemned for another lease. That is a hold and no grace: nothing was lost, so nobody asserts.
HEAD = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local meta, leases = KEYS[1], KEYS[2]
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%w+)')
local m = redis.call('HMGET', meta, 'run', 'era', 'grace_until', 'jobs_floor', 'seen', 'hold_until')
local era, grace_until, floor, silence = m[2], tonumber(m[3] or '0'), m[4], now - tonumber(m[5] or '0')
local hold_until = tonumber(m[6] or '0')
if m[1] ~= run then
  era, grace_until, floor = run .. ':' .. string.format('%.0f', t[1] * 1000000 + t[2]), now + tonumber(ARGV[1]), false
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

# KEYS: .. workers. ARGV: lease_ms worker info fields. Refused while a living worker of the same model differs in one of the layout `fields`
# ('differs', owner, its info); one that may yet say again that it lives (grace, hold) is waited for ('wait', ms).
_REGISTER = """
local mine, wait_ms = cmsgpack.unpack(ARGV[3]), 0
local infos = mine.layout and redis.call('HGETALL', KEYS[3]) or {}
for i = 1, #infos, 2 do
  local theirs = cmsgpack.unpack(infos[i + 1])
  local is_other = string.match(infos[i], '^(.*)%.%d+$') ~= ARGV[2]
  if is_other and theirs.layout and theirs.model == mine.model and (lives(infos[i]) or now < hold_until) then
    for _, field in ipairs(words(ARGV[4])) do
      if theirs.layout[field] ~= mine.layout[field] then
        if lives(infos[i]) then return {'differs', infos[i], infos[i + 1]} end
        wait_ms = hold_until - now
      end
    end
  end
end
if wait_ms > 0 then return {'wait', int(wait_ms)} end
local incarnation = math.max(tonumber(redis.call('HGET', meta, 'incarnation') or '0') + 1, now)
local owner = ARGV[2] .. '.' .. int(incarnation)
redis.call('HSET', meta, 'incarnation', int(incarnation))
redis.call('HSET', leases, owner, int(now + tonumber(ARGV[1])))
redis.call('HSET', KEYS[3], owner, ARGV[3])
return {'ok', int(incarnation), floor and '' or era}
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

# KEYS: .. job. ARGV: lease_ms owner epoch. A new epoch for the same owner: handles that are out are void from here on. A later epoch of
# the same owner was given by an earlier call, whose reply was lost or is still on its way.
_TAKE_BACK = """
local f = redis.call('HMGET', KEYS[3], 'owner', 'epoch', 'state', 'era', 'is_swept')
if f[1] ~= ARGV[2] or tonumber(f[2]) < tonumber(ARGV[3]) or f[3] ~= 'owned' or f[4] ~= era or f[5] ~= '1' then return '0' end
local epoch = int(tonumber(f[2]) + 1)
redis.call('HSET', KEYS[3], 'epoch', epoch)
return epoch
"""

# KEYS: .. open load tenants job. ARGV: lease_ms job class tokens tenant max_class_tokens max_tenant_jobs max_tenant_tokens (0: none)
#   origin prompt_tokens ttl is_named max_tenant_tokens_per_minute.
# The job's record gets what a reader at another shim needs; without an era it is missing for claims.
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
-- Of what was submitted, over or not: counted in whole minutes, and a single job over the rate has a minute of its own.
local per_minute, minute = tonumber(ARGV[13]), math.floor(now / 60000)
local at, spent = string.match(redis.call('HGET', KEYS[4], 'minute ' .. tenant) or '', '^(%d+) (%d+)$')
spent = tonumber(at) == minute and tonumber(spent) or 0
if per_minute > 0 and spent > 0 and spent + tokens > per_minute then
  return {'tenant_rate', tostring(per_minute), int((minute + 1) * 60000 - now)}
end
if most > 0 and queued > most and queued > tokens then return {'class_tokens', tostring(most)} end
local num_tenants = redis.call('HLEN', KEYS[5]) + (held == tokens and 1 or 0)
if most > 0 and queued * 2 > most and num_tenants > 1 and held > most / num_tenants then
  return {'tenant_share', int(most / num_tenants)}
end
if per_minute > 0 then redis.call('HSET', KEYS[4], 'minute ' .. tenant, int(minute) .. ' ' .. int(spent + tokens)) end
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

SCRIPTS = {
    "found": _FOUND, "floor": _FLOOR, "register": _REGISTER, "renew": _RENEW, "claim": _CLAIM, "fenced": _FENCED, "take": _TAKE,
    "take_back": _TAKE_BACK, "finish": _FINISH, "give_up": _GIVE_UP, "try": _TRY, "admit": _ADMIT, "reader": _READER, "stale": _STALE,
    "discharge": _DISCHARGE, "assert": _ASSERT, "retire": _RETIRE, "orphans": _ORPHANS,
    "bury": _BURY, "lead": _LEAD, "cancel": _CANCEL, "view": _VIEW,
    **BATCH_SCRIPTS, **ANSWER_SCRIPTS, **PREFIX_SCRIPTS, **VIEW_SCRIPTS,
}
