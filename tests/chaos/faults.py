"""Every way in which a process of the farm is broken here, by name."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

import redis

from tests.chaos.chaos_farm import DECODES, PREFILLS, SHIMS, WORKERS, ChaosFarm
from tests.chaos.scenario import Scenario

_drawn = random.Random(11)


def one_of(names: tuple[str, ...], fault: Callable[[ChaosFarm, str], Awaitable[None]]) -> Callable[[ChaosFarm], Awaitable[None]]:
    async def strike(farm: ChaosFarm) -> None:
        await fault(farm, _drawn.choice(await farm.serving(names)))

    return strike


async def kill(farm: ChaosFarm, name: str) -> None:
    await farm.kill(name)
    farm.restart(name)


async def kill_engine(farm: ChaosFarm, name: str) -> None:
    await farm.kill_engine(name)
    farm.restart(name)


def stop(seconds: float) -> Callable[[ChaosFarm, str], Awaitable[None]]:
    """SIGSTOP to the I/O process (or the shim), SIGCONT after `seconds`: a zombie."""

    async def strike(farm: ChaosFarm, name: str) -> None:
        with farm.stopped(farm.processes[name].process.pid):
            await asyncio.sleep(seconds)

    return strike


def stop_engine(seconds: float) -> Callable[[ChaosFarm, str], Awaitable[None]]:
    async def strike(farm: ChaosFarm, name: str) -> None:
        with farm.stopped(farm.engine_pid(name)):
            await asyncio.sleep(seconds)

    return strike


def restart_nats(down_s: float) -> Callable[[ChaosFarm], Awaitable[None]]:
    async def strike(farm: ChaosFarm) -> None:
        await asyncio.to_thread(farm.services.nats.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(farm.services.nats.start)

    return strike


def restart_redis(down_s: float) -> Callable[[ChaosFarm], Awaitable[None]]:
    async def strike(farm: ChaosFarm) -> None:
        await asyncio.to_thread(farm.services.redis.kill)
        await asyncio.sleep(down_s)
        await asyncio.to_thread(farm.services.redis.start)

    return strike


async def flush_redis(farm: ChaosFarm) -> None:
    """Everything that Redis knew is gone, with the server still running."""
    def flush() -> None:
        with redis.Redis.from_url(farm.services.redis_url) as client:
            client.flushall()

    await asyncio.to_thread(flush)


def stop_server(which: str, seconds: float) -> Callable[[ChaosFarm], Awaitable[None]]:
    async def strike(farm: ChaosFarm) -> None:
        server = farm.services.nats if which == "nats" else farm.services.redis
        with farm.stopped(server.pid):
            await asyncio.sleep(seconds)

    return strike


def kill_all(names: tuple[str, ...]) -> Callable[[ChaosFarm], Awaitable[None]]:
    async def strike(farm: ChaosFarm) -> None:
        await asyncio.gather(*(farm.kill(name) for name in names))
        for name in names:
            farm.restart(name)

    return strike


async def rolling_restart(farm: ChaosFarm) -> None:
    """SIGTERM to one worker after the other, each started again before the next: nothing has to be taken over."""
    for name in WORKERS:
        farm.processes[name].signal(signal.SIGTERM)
        status = await farm.wait_ended(name)
        assert status == 0, f"{name} ended with status {status} on SIGTERM\n{farm.processes[name].log[-3000:]}"
        farm.restart(name)
        await farm.restarted()


async def kill_watcher_and_a_worker(farm: ChaosFarm) -> None:
    """Whoever watches leases dies together with a decode worker: somebody else must notice both."""
    leader = await farm.watch_leader()
    watchers = (leader,) if leader in WORKERS else SHIMS     # a shim's own name in Redis is not its process'
    victims = {*watchers, _drawn.choice(await farm.serving([name for name in DECODES if name not in watchers]))}
    await asyncio.gather(*(farm.kill(name) for name in victims))
    for name in victims:
        farm.restart(name)


def cut(service: str, seconds: float, *, reset: bool) -> Callable[[ChaosFarm], Awaitable[None]]:
    """The network between NATS or Redis and one of the workers that reach it through a proxy."""
    async def strike(farm: ChaosFarm) -> None:
        proxies = [proxy for (_, name), proxy in farm.proxies.items() if name == service]
        await _drawn.choice(proxies).cut(seconds, reset=reset)

    return strike


THRICE = (0.15, 0.4, 0.65)

LONG = [
    Scenario(name="decode worker SIGKILL", fault=one_of(DECODES, kill), at=THRICE),
    Scenario(name="prefill worker SIGKILL", fault=one_of(PREFILLS, kill), at=THRICE),
    Scenario(name="decode engine SIGKILL", fault=one_of(DECODES, kill_engine), at=THRICE),
    Scenario(name="prefill engine SIGKILL", fault=one_of(PREFILLS, kill_engine), at=THRICE),
    Scenario(name="decode worker SIGSTOP 10 s", fault=one_of(DECODES, stop(10.0))),
    Scenario(name="decode worker SIGSTOP 20 s", fault=one_of(DECODES, stop(20.0))),
    Scenario(name="prefill worker SIGSTOP 15 s", fault=one_of(PREFILLS, stop(15.0))),
    Scenario(name="decode engine SIGSTOP 10 s", fault=one_of(DECODES, stop_engine(10.0))),
    Scenario(name="prefill engine SIGSTOP 10 s", fault=one_of(PREFILLS, stop_engine(10.0))),
    Scenario(name="every decode worker SIGKILL", fault=kill_all(DECODES), at=(0.3,)),
    Scenario(name="every prefill worker SIGKILL", fault=kill_all(PREFILLS), at=(0.3,)),
    Scenario(name="REST shim SIGKILL", fault=one_of(SHIMS, kill), at=THRICE),
    Scenario(name="REST shim SIGSTOP 12 s", fault=one_of(SHIMS, stop(12.0)), patience_s=3.0),
    Scenario(name="lease watcher and a worker SIGKILL", fault=kill_watcher_and_a_worker, at=THRICE),
    Scenario(name="nats-server SIGKILL", fault=restart_nats(0.0), at=THRICE),
    Scenario(name="nats-server away 4 s", fault=restart_nats(4.0)),
    Scenario(name="nats-server SIGSTOP 10 s", fault=stop_server("nats", 10.0)),
    Scenario(name="Valkey SIGKILL", fault=restart_redis(0.0), at=THRICE),
    Scenario(name="Valkey away 4 s", fault=restart_redis(4.0)),
    Scenario(name="Valkey SIGSTOP 10 s", fault=stop_server("redis", 10.0)),
    Scenario(name="Valkey FLUSHALL", fault=flush_redis, at=THRICE),
    Scenario(name="rolling restart of every worker", fault=rolling_restart, at=(0.2,)),
]

PARTITIONS = [
    Scenario(name="NATS cut from a worker 3 s, reset", fault=cut("nats", 3.0, reset=True), at=(0.25, 0.6)),
    Scenario(name="NATS cut from a worker 10 s, silent", fault=cut("nats", 10.0, reset=False)),
    Scenario(name="Redis cut from a worker 3 s, reset", fault=cut("redis", 3.0, reset=True), at=(0.25, 0.6)),
    Scenario(name="Redis cut from a worker 10 s, silent", fault=cut("redis", 10.0, reset=False)),
]

SHORT = [
    Scenario(name="decode worker SIGKILL", fault=one_of(DECODES, kill), at=(0.2,)),
    Scenario(name="prefill worker SIGKILL", fault=one_of(PREFILLS, kill), at=(0.2,)),
    Scenario(name="decode worker SIGSTOP 4 s", fault=one_of(DECODES, stop(4.0)), at=(0.2,)),
    Scenario(name="REST shim SIGKILL", fault=one_of(SHIMS, kill), at=(0.2,)),
    Scenario(name="nats-server SIGKILL", fault=restart_nats(0.0), at=(0.2,)),
    Scenario(name="Valkey SIGKILL", fault=restart_redis(0.0), at=(0.2,)),
    Scenario(name="Valkey FLUSHALL", fault=flush_redis, at=(0.2,)),
]
