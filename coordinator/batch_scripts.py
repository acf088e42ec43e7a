"""The Lua scripts of batch_store.py, run like those of store_scripts.py: same head, same keys {meta, leases, …}, same first argument.

A batch is led by one shim at a time, under an epoch that grows with each new leader: what a former leader says afterwards is refused.
"""

# KEYS: .. batch batches open. ARGV: lease_ms id created_ms (0: now) window_ms ttl_s, then field value … 0: there is one of this id.
_CREATE = """
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local created = tonumber(ARGV[3])
if created == 0 then created = now end
redis.call('HSET', KEYS[3], 'id', ARGV[2], 'status', 'validating', 'epoch', 0, 'created_ms', int(created),
  'expires_ms', int(created + tonumber(ARGV[4])), unpack(ARGV, 6))
redis.call('EXPIRE', KEYS[3], ARGV[5])
redis.call('ZADD', KEYS[4], int(created), ARGV[2])
redis.call('SADD', KEYS[5], ARGV[2])
return 1
"""

# KEYS: .. batch. ARGV: lease_ms name leader_ms. The new epoch; 0 while another one leads, or when there is no such batch.
_LEAD = """
local f = redis.call('HMGET', KEYS[3], 'status', 'leader', 'leader_until', 'epoch')
if not f[1] or (f[2] and f[2] ~= ARGV[2] and tonumber(f[3]) > now) then return '0' end
local epoch = int(tonumber(f[4]) + 1)
redis.call('HSET', KEYS[3], 'leader', ARGV[2], 'leader_until', int(now + tonumber(ARGV[3])), 'epoch', epoch)
return epoch
"""

# KEYS: .. batch. ARGV: lease_ms epoch leader_ms, then counter value … '': not led under this epoch (any more).
# Counters only grow: a new leader counts what its predecessor had counted again.
_BEAT = """
local f = redis.call('HMGET', KEYS[3], 'status', 'epoch')
if f[2] ~= ARGV[2] then return '' end
redis.call('HSET', KEYS[3], 'leader_until', int(now + tonumber(ARGV[3])))
for i = 4, #ARGV, 2 do
  if tonumber(ARGV[i + 1]) > tonumber(redis.call('HGET', KEYS[3], ARGV[i]) or '0') then
    redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 1])
  end
end
return f[1]
"""

# KEYS: .. batch open. ARGV: lease_ms id epoch ('' for anybody) from to is_last, then field value …
# The status that stands then; '': no such batch, or not led under this epoch.
_MOVE = """
local f = redis.call('HMGET', KEYS[3], 'status', 'epoch')
if not f[1] or (ARGV[3] ~= '' and f[2] ~= ARGV[3]) then return '' end
local may = false
for _, status in ipairs(words(ARGV[4])) do may = may or status == f[1] end
if not may then return f[1] end
redis.call('HSET', KEYS[3], 'status', ARGV[5], ARGV[5] .. '_at', int(math.floor(now / 1000)), unpack(ARGV, 7))
if ARGV[6] == '1' then
  redis.call('HDEL', KEYS[3], 'leader', 'leader_until')
  redis.call('SREM', KEYS[4], ARGV[2])
end
return ARGV[5]
"""

# KEYS: .. batch. ARGV: lease_ms epoch. Whoever looks next may lead at once.
_LEAVE = """
if redis.call('HGET', KEYS[3], 'epoch') == ARGV[2] then redis.call('HDEL', KEYS[3], 'leader', 'leader_until') end
return 1
"""

# KEYS: .. batches open. ARGV: lease_ms after ('' for the newest) limit. Ids, newest first; those that have aged out are forgotten.
_LIST = """
local first, found = 0, {}
if ARGV[2] ~= '' then
  local rank = redis.call('ZREVRANK', KEYS[3], ARGV[2])
  if not rank then return {} end
  first = rank + 1
end
for _, id in ipairs(redis.call('ZREVRANGE', KEYS[3], first, first + ARGV[3] - 1)) do
  if redis.call('EXISTS', '{tokenmill}:batch:' .. id) == 1 then
    found[#found + 1] = id
  else
    redis.call('ZREM', KEYS[3], id)
    redis.call('SREM', KEYS[4], id)
  end
end
return found
"""

# KEYS: .. open. ARGV: lease_ms
_OPEN = "return redis.call('SMEMBERS', KEYS[3])"

BATCH_SCRIPTS = {"batch_create": _CREATE, "batch_lead": _LEAD, "batch_beat": _BEAT, "batch_move": _MOVE, "batch_leave": _LEAVE,
                 "batch_list": _LIST, "batch_open": _OPEN}
