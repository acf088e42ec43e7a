"""Every way in which a process of the farm is broken here, by name."""

import asyncio
import random
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


async def kill_watcher_and_a_worker(farm: ChaosFarm) -> None:
    """Whoever watches leases dies together with a decode worker: somebody else must notice both."""
    leader = await farm.watch_leader()
    watchers = (leader,) if leader in WORKERS else SHIMS     # a shim's own name in Redis is not its process'
    victims = {*watchers, _drawn.choice(await farm.serving([name for name in DECODES if name not in watchers]))}
    await asyncio.gather(*(farm.kill(name) for name in victims))
    for name in victims:
        farm.restart(name)


ALL: dict[str, Callable[[int], Scenario]] = {}


def _add(name: str, fault: Callable[[ChaosFarm], Awaitable[None]], at: tuple[float, ...] = (0.25,), **more: float) -> None:
    ALL[name] = lambda num_jobs: Scenario(name=name, fault=fault, num_jobs=num_jobs, at=at, **more)  # type: ignore[arg-type]


THRICE = (0.15, 0.4, 0.65)
_add("decode worker SIGKILL", one_of(DECODES, kill), THRICE)
_add("prefill worker SIGKILL", one_of(PREFILLS, kill), THRICE)
_add("decode engine SIGKILL", one_of(DECODES, kill_engine), THRICE)
_add("prefill engine SIGKILL", one_of(PREFILLS, kill_engine), THRICE)
_add("decode worker SIGSTOP 10 s", one_of(DECODES, stop(10.0)))
_add("prefill worker SIGSTOP 10 s", one_of(PREFILLS, stop(10.0)))
_add("decode engine SIGSTOP 10 s", one_of(DECODES, stop_engine(10.0)))
_add("shim SIGKILL", one_of(SHIMS, kill), THRICE)
_add("shim SIGSTOP 10 s", one_of(SHIMS, stop(10.0)), patience_s=3.0)
_add("nats-server SIGKILL", restart_nats(0.0), THRICE)
_add("nats-server away 4 s", restart_nats(4.0))
_add("nats-server SIGSTOP 10 s", stop_server("nats", 10.0))
_add("Valkey SIGKILL", restart_redis(0.0), THRICE)
_add("Valkey away 4 s", restart_redis(4.0))
_add("Valkey SIGSTOP 10 s", stop_server("redis", 10.0))
_add("Valkey FLUSHALL", flush_redis, THRICE)
_add("lease watcher SIGKILL", kill_watcher_and_a_worker, THRICE)
