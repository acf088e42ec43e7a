"""Connections to Redis by URL, for store.py.

    redis://, rediss://, unix://     one server (or what stands before several)
    redis+sentinel://[user:password@]host:port,host:port,…/service[/db]
                                     the primary that these Sentinels name; after a failover the next call finds the new one

A cluster is refused: all keys of a farm live in one slot, so it would be one node of it that works. Use Sentinel for high availability.
"""

import re
from collections.abc import Iterable
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from coordinator import tls
from coordinator.errors import ConfigError

SOCKET_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 32
MAX_SENTINEL_CONNECTIONS = 256      # this pool does not wait for a free one, so it must never run out
_SENTINEL = re.compile(r"redis\+sentinel://(?:(?P<user>[^:@/]*):(?P<password>[^@/]*)@)?(?P<hosts>[^/@]+)/(?P<service>[\w.-]+)(?:/(?P<db>\d+))?")


class Connections:
    """`client` for commands; close() closes all there are, those to Sentinels too."""

    def __init__(self, client: redis.Redis, sentinels: Iterable[redis.Redis] = ()) -> None:
        self.client = client
        self._all = (client, *sentinels)

    async def close(self) -> None:
        for client in self._all:
            await client.aclose()
            await client.connection_pool.disconnect()


def connect(url: str) -> Connections:
    """Lazily connected. Raises ConfigError for a URL that cannot be honoured."""
    # Protocol 2: with 3 the library hands out idle connections that a restarted server has closed.
    options: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "socket_connect_timeout": SOCKET_TIMEOUT_S, "protocol": 2,
                               "retry": Retry(NoBackoff(), 0)}
    if url.startswith("redis+sentinel://"):
        return _by_sentinel(url, options)
    if not re.match(r"(rediss?|unix)://", url):
        raise ConfigError(f"--redis_url {without_password(url)}: must begin with redis://, rediss://, unix:// or redis+sentinel://; a "
                          "cluster is not taken, for all keys of a farm live in one slot")
    pool = redis.BlockingConnectionPool.from_url(url, max_connections=MAX_CONNECTIONS, timeout=5, **options, **tls.redis_options(url))
    return Connections(redis.Redis(connection_pool=pool))


def without_password(url: str) -> str:
    """For messages."""
    return re.sub(r"//[^/@]*@", "//", url)


def _by_sentinel(url: str, options: dict[str, Any]) -> Connections:
    match = _SENTINEL.fullmatch(url)
    if match is None:
        raise ConfigError(f"--redis_url {without_password(url)}: must be redis+sentinel://[user:password@]host:port,host:port/service[/db]")
    hosts = [host.rpartition(":") for host in match["hosts"].split(",")]
    if not all(name and port.isdigit() for name, _, port in hosts):
        raise ConfigError(f"--redis_url {without_password(url)}: each Sentinel is named with its port, as in s1:26379,s2:26379")
    login = {"username": match["user"] or None, "password": match["password"]} if match["password"] else {}
    sentinel = Sentinel([(name, int(port)) for name, _, port in hosts], sentinel_kwargs=options, **options, **login)
    primary = sentinel.master_for(match["service"], db=int(match["db"] or 0), max_connections=MAX_SENTINEL_CONNECTIONS)
    return Connections(primary, sentinel.sentinels)
