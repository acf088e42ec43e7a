"""Where a group's desk is, told through the farm's Redis: nodes that know the queue need not be told --nccl_host.

    node 0     listens on the address towards Redis, writes it down under the group's name
    others     read it, ask there, and read it again as long as nobody answers: what a dead node 0 left is overwritten by its successor
"""

import asyncio
import socket
from urllib.parse import urlsplit

from coordinator.errors import ConfigError
from coordinator.host_identity import address_towards
from coordinator.store import Store

PROBE_S = 2.0
REDIS_PORT = 6379


def own_address(redis_url: str) -> str:
    """Where other nodes of this farm reach this one. Raises ConfigError when Redis is not reached by any network."""
    server = urlsplit(redis_url)
    address = address_towards(server.hostname or "127.0.0.1", server.port or REDIS_PORT)
    if not address:
        raise ConfigError(f"there is no way to Redis at {server.hostname}: give --nccl_host")
    return address


def tell(redis_url: str, group: str, address: str) -> None:
    """Raises ConfigError if another group of this name is there, Unavailable if Redis is not."""
    former = find(redis_url, group)
    if former and former != address and _is_there(former):
        raise ConfigError(f"another group called {group} meets at {former}: give each --worker_id (the same on all its nodes), or "
                          "--nccl_host")
    asyncio.run(_tell(redis_url, group, address))


def find(redis_url: str, group: str) -> str:
    """host:port, "" if nobody wrote it down. Raises Unavailable."""
    return asyncio.run(_find(redis_url, group))


async def _tell(redis_url: str, group: str, address: str) -> None:
    store = Store(redis_url)
    try:
        await store.note_desk(group, address)
    finally:
        await store.close()


async def _find(redis_url: str, group: str) -> str:
    store = Store(redis_url)
    try:
        return (await store.hash("desks")).get(group, "")
    finally:
        await store.close()


def _is_there(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_S):
            return True
    except OSError:
        return False
