"""The Lua scripts of members.py, open_jobs.py and planning.py, run like those of store_scripts.py.

Same head, same keys {meta, leases, …}, same first argument.
"""


# KEYS: .. members members_until. ARGV: lease_ms name info ttl_ms
_BEAT = """
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
redis.call('HSET', KEYS[4], ARGV[2], int(now + tonumber(ARGV[4])))
return 1
"""

# KEYS: .. members members_until. ARGV: lease_ms name
_LEAVE = """
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[2])
return 1
"""

# KEYS: .. members members_until. ARGV: lease_ms forget_ms. (name, ms left, info) of each; one that was silent for long is forgotten.
_LIST = """
local rows = {}
local infos = redis.call('HGETALL', KEYS[3])
for i = 1, #infos, 2 do
  local left = tonumber(redis.call('HGET', KEYS[4], infos[i]) or '0') - now
  if left < -tonumber(ARGV[2]) then
    redis.call('HDEL', KEYS[3], infos[i])
    redis.call('HDEL', KEYS[4], infos[i])
  else
    rows[#rows + 1] = {infos[i], int(left), infos[i + 1]}
  end
end
return rows
"""

# KEYS: .. open workers. ARGV: lease_ms. Rows of (id, entry of `open` or '', state, owner, epoch, model, cancelled, now).
_OPEN_JOBS = """
local rows, seen = {}, {}
local function row(id, entry)
  if seen[id] then return end
  seen[id] = true
  local f = redis.call('HMGET', '{tokenmill}:job:' .. id, 'state', 'owner', 'epoch', 'model', 'cancelled')
  rows[#rows + 1] = {id, entry, f[1] or '', f[2] or '', f[3] or '0', f[4] or '', f[5] or '', int(now)}
end
local open = redis.call('HGETALL', KEYS[3])
for i = 1, #open, 2 do row(open[i], open[i + 1]) end
for _, owner in ipairs(redis.call('HKEYS', KEYS[4])) do
  for _, id in ipairs(redis.call('SMEMBERS', '{tokenmill}:owned:' .. owner)) do row(id, '') end
end
return rows
"""

# KEYS: .. planner planner_log. ARGV: lease_ms note decision most. What the planner sees now, and ('' if none) what it decided.
_PLANNER_NOTE = """
redis.call('SET', KEYS[3], ARGV[2], 'PX', 60000)
if ARGV[3] ~= '' then
  redis.call('LPUSH', KEYS[4], ARGV[3])
  redis.call('LTRIM', KEYS[4], 0, tonumber(ARGV[4]) - 1)
end
return 1
"""

# KEYS: .. planner planner_log. ARGV: lease_ms. (what it sees, its decisions, newest first)
_PLANNER_SAID = "return {redis.call('GET', KEYS[3]) or '', unpack(redis.call('LRANGE', KEYS[4], 0, -1))}"

VIEW_SCRIPTS = {"member_beat": _BEAT, "member_leave": _LEAVE, "members": _LIST, "open_jobs": _OPEN_JOBS, "planner_note": _PLANNER_NOTE,
                "planner_said": _PLANNER_SAID}
