"""The script that writes a value unless the store holds one of a later event.

The script runs in the server, so no other write can come between comparison and write. It reads the first bytes of
the stored value only and uses one key, so it works in a cluster. It applies the rule of
`protocols.source_position.may_replace`; the store's contract suite tests both.
"""

from __future__ import annotations

import hashlib

from protocols.source_position import BEFORE_POSITION, HEAD_BYTES, POSITION_AT

_START = "".join(f"\\{byte:03d}" for byte in BEFORE_POSITION)

#: KEYS: the key. ARGV: the value, and its lifetime in milliseconds or 0. Returns 1 if the value was written, else 0.
#: A stored value of another type than a string is replaced.
WRITE_UNLESS_OLDER = f"""
local start = "{_START}"
local function number(value, at)
  local result = 0
  for i = at, at + 7 do result = result * 256 + string.byte(value, i) end
  return result
end
local new = ARGV[1]
if #new >= {HEAD_BYTES} and string.sub(new, 2, {POSITION_AT}) == start then
  local old = redis.pcall('GETRANGE', KEYS[1], 0, {HEAD_BYTES - 1})
  if type(old) == 'table' and not string.find(old['err'], 'WRONGTYPE', 1, true) then
    return old
  end
  if type(old) == 'string' and #old == {HEAD_BYTES} and string.sub(old, 2, {POSITION_AT}) == start
    and number(new, {POSITION_AT + 1}) < number(old, {POSITION_AT + 1})
    and number(new, {POSITION_AT + 9}) <= number(old, {POSITION_AT + 9}) then
    return 0
  end
end
if ARGV[2] == '0' then
  redis.call('SET', KEYS[1], new)
else
  redis.call('SET', KEYS[1], new, 'PX', ARGV[2])
end
return 1
"""
WRITE_UNLESS_OLDER_SHA = hashlib.sha1(WRITE_UNLESS_OLDER.encode(), usedforsecurity=False).hexdigest()
