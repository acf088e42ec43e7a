"""How many commands Redis carried out, by name: what clients sent, and what scripts called inside."""

import redis

FROM_CLIENTS = ("evalsha", "eval", "hgetall", "hmget", "ping")   # the commands that coordinator/store.py and its like send


def calls(url: str) -> dict[str, int]:
    with redis.Redis.from_url(url) as client:
        stats = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(figures["calls"]) for name, figures in stats.items()}


def usec(url: str) -> int:
    """Microseconds that the server spent in scripts and commands from clients."""
    with redis.Redis.from_url(url) as client:
        stats = client.info("commandstats")
    return sum(int(figures["usec"]) for name, figures in stats.items() if name.removeprefix("cmdstat_") in FROM_CLIENTS)


def of_clients(spent: dict[str, int]) -> int:
    """Commands that travelled. Inside scripts HMGET and HGETALL are called too, so they count by what no script explains."""
    return spent.get("evalsha", 0) + spent.get("eval", 0)


def difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}


def leader(url: str, task: str) -> str:
    """Who does `task` now; "" if nobody."""
    with redis.Redis.from_url(url) as client:
        name = client.get(f"{{tokenmill}}:leader:{task}")
    return name.decode() if isinstance(name, bytes) else ""
