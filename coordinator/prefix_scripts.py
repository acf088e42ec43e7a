"""The Lua scripts of prefix_index.py. They get what those of store_scripts.py get, and run behind the same head.

The index is a hint: nothing rests on it, so entries may be dropped at any time. It says who holds a page: incarnation numbers, newest last.
"""

# KEYS: .. index. ARGV: lease_ms holder era most_blocks most_holders num_added added… evicted…
# `era` is that of the holder's last call: in another one Redis may have forgotten what was said, so all of it is wanted again.
_PREFIX_TELL = """
local index, me, most, most_holders, num_added = KEYS[3], ARGV[2], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
if ARGV[3] ~= era then return era end
local size = redis.call('HLEN', index)
for i = 7, #ARGV do
  local held = redis.call('HGET', index, ARGV[i])
  local left = words(held or '')
  for at = #left, 1, -1 do if left[at] == me then table.remove(left, at) end end
  if i < 7 + num_added then
    left[#left + 1] = me
    if #left > most_holders then table.remove(left, 1) end
  end
  if #left == 0 then
    if held then redis.call('HDEL', index, ARGV[i]); size = size - 1 end
  else
    if not held then
      if size >= most then redis.call('HDEL', index, redis.call('HRANDFIELD', index)) else size = size + 1 end
    end
    redis.call('HSET', index, ARGV[i], table.concat(left, ' '))
  end
end
return era
"""

# KEYS: .. index. ARGV: lease_ms cursor count. Holders without a lease go. Replies with the next cursor ("0": the end).
_PREFIX_SWEEP = """
local alive = {}
local entries = redis.call('HKEYS', leases)
for _, owner in ipairs(entries) do alive[string.match(owner, '(%d+)$')] = true end
local reply = redis.call('HSCAN', KEYS[3], ARGV[2], 'COUNT', ARGV[3])
for i = 1, #reply[2], 2 do
  local left, had = {}, words(reply[2][i + 1])
  for _, holder in ipairs(had) do if alive[holder] then left[#left + 1] = holder end end
  if #left == 0 then redis.call('HDEL', KEYS[3], reply[2][i])
  elseif #left < #had then redis.call('HSET', KEYS[3], reply[2][i], table.concat(left, ' ')) end
end
return reply[1]
"""

PREFIX_SCRIPTS = {"prefix_tell": _PREFIX_TELL, "prefix_sweep": _PREFIX_SWEEP}
