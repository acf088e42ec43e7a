"""A farm that is meant to be broken: two of everything, each process killable, its engine apart, its connections through proxies."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import psutil
import redis.asyncio as redis

from coordinator.bus import Bus
from coordinator.store import PREFIX, Store
from coordinator.subjects import model_token
from tests.chaos.proxy import TcpProxy
from tests.system.farm import READY_S, Farm, Process

PREFILLS, DECODES, SHIMS = ("prefill-1", "prefill-2"), ("decode-1", "decode-2"), ("rest-1", "rest-2")
WORKERS = PREFILLS + DECODES


class ChaosFarm(Farm):
    """Use as an async context manager around `start_all`."""

    def __init__(self, folder: Path, model_dir: Path, *, lease_s: float, max_queued: int = 10_000) -> None:
        super().__init__(folder, model_dir, lease_s=lease_s)
        self.proxies: dict[tuple[str, str], TcpProxy] = {}
        self._max_queued = max_queued
        self._restarts: dict[str, asyncio.Task[None]] = {}

    async def start_all(self, *, proxied: tuple[str, ...] = ()) -> None:
        """2 shims, 2 prefill and 2 decode workers. Those named in `proxied` reach NATS and Redis through proxies of their own."""
        for name in WORKERS:
            flags = await self._through_proxies(name) if name in proxied else []
            more = ["--chunked_prefill_size", "64"] if name in PREFILLS else []
            self.worker(name.partition("-")[0], name, "--max_queued", str(self._max_queued), *more, *flags)
        for name in SHIMS:
            self.rest(name, "--max_queued", str(self._max_queued), wait=False)
        for name in SHIMS:
            await asyncio.to_thread(self.wait_ready, name)
        await self.wait_registered(*WORKERS)

    async def _through_proxies(self, name: str) -> list[str]:
        flags = []
        for service, server in (("nats", self.services.nats), ("redis", self.services.redis)):
            proxy = self.proxies[name, service] = await TcpProxy.open("127.0.0.1", server.port)
            flags += [f"--{service}_url", f"{server.scheme}://127.0.0.1:{proxy.port}"]
        return flags

    async def close_proxies(self) -> None:
        for proxy in self.proxies.values():
            await proxy.close()

    # ---- what the killer does ----

    def engine_pid(self, name: str) -> int:
        """The engine process of a worker."""
        children = psutil.Process(self.processes[name].process.pid).children(recursive=True)
        return next(child.pid for child in children if "workers.engine" in child.cmdline())

    async def kill(self, name: str) -> None:
        """SIGKILL to the process alone, and wait for its end. One that is on its way up after an earlier kill dies too."""
        await self._forget_restart(name)
        self.processes[name].signal(signal.SIGKILL)
        await self.wait_ended(name)

    async def kill_engine(self, name: str) -> None:
        """SIGKILL to the engine alone: its I/O process must notice and leave by itself."""
        os.kill(self.engine_pid(name), signal.SIGKILL)
        await self.wait_ended(name)

    async def crash_engine(self, name: str) -> None:
        """The engine ends by a fault of its own: a segmentation fault, as a broken kernel makes."""
        os.kill(self.engine_pid(name), signal.SIGSEGV)
        await self.wait_ended(name)

    async def serving(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are not on their way up after an earlier strike; waits for them when all are."""
        while not (found := [name for name in names if (task := self._restarts.get(name)) is None or task.done()]):
            await asyncio.wait([self._restarts[name] for name in names], return_when=asyncio.FIRST_COMPLETED)
        return found

    async def _forget_restart(self, name: str) -> None:
        if (task := self._restarts.pop(name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def wait_ended(self, name: str) -> int:
        return await asyncio.to_thread(self.processes[name].process.wait, 60.0)

    def restart(self, name: str) -> None:
        """Start again what has ended; `restarted` waits until it serves."""
        self.processes[name].start()
        self._restarts[name] = asyncio.create_task(self._wait_serving(name))

    async def restarted(self) -> None:
        """Until everything that was restarted serves."""
        tasks, self._restarts = list(self._restarts.values()), {}
        await asyncio.gather(*tasks)

    async def _wait_serving(self, name: str) -> None:
        if name in SHIMS:
            await asyncio.to_thread(self.wait_for, f"{self.url(name)}/liveness", name)
        else:
            await self.wait_living(name)

    @contextlib.contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """SIGSTOP for the length of the block, then SIGCONT: afterwards it is a zombie that knows nothing of the time between."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    async def wait_living(self, name: str) -> None:
        """Until the process that runs now (not an earlier one of that name) holds a lease."""
        pid = self.processes[name].process.pid
        store = Store(self.services.redis_url)
        try:
            async with asyncio.timeout(READY_S):
                while not any(v.worker == name and v.is_alive and v.info.get("pid") == pid for v in await store.workers()):
                    assert self.processes[name].is_running, f"{name} ended\n{self.processes[name].log[-3000:]}"
                    await asyncio.sleep(0.05)
        finally:
            await store.close()

    async def watch_leader(self) -> str:
        """Who watches leases now, by the name that it has in Redis; "" for nobody."""
        async with redis.Redis.from_url(self.services.redis_url, decode_responses=True) as client:
            return await client.get(f"{PREFIX}leader:watcher") or ""

    @contextlib.asynccontextmanager
    async def bus(self) -> AsyncIterator[Bus]:
        async with await Bus.connect(self.services.nats_url, "chaos") as bus:
            yield bus

    @property
    def model_token(self) -> str:
        return model_token(self.model)

    def all_alive(self) -> list[Process]:
        return [process for process in self.processes.values() if process.is_running]
