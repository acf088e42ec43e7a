"""The Redis scripts of answer_store.py. They touch nothing else, so they need no head."""

ANSWER_SCRIPTS = {
    "answer_keep": "return redis.call('SET', KEYS[3], ARGV[2], 'NX', 'EX', ARGV[3])",
    "answer_get": "return redis.call('GET', KEYS[3])",
    "answer_forget": "return redis.call('DEL', KEYS[3])",
}
