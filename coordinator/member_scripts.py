"""The Lua scripts of members.py, run like those of store_scripts.py: same head, same keys {meta, leases, …}, same first argument."""

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

MEMBER_SCRIPTS = {"member_beat": _BEAT, "member_leave": _LEAVE, "members": _LIST}
