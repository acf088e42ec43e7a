"""A worker's I/O process: joins the engine to the queue. `python -m workers.worker --role prefill|decode|both …`

Everything here is asyncio and short; the math runs in the engine process (workers/engine.py), so nothing blocks leases and beats.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import urlsplit

from coordinator import lifeline
from coordinator.bus import Bus
from coordinator.collector import settle
from coordinator.errors import ConfigError, TokenmillError, Unavailable
from coordinator.host_identity import address_towards
from coordinator.lifeline import DRAINED_STATUS
from coordinator.process_state import StoppedFor
from coordinator.rendezvous import CRASHED, DONE, PEER_STATUS, SILENCE_S, VANISHED
from coordinator.store import Blame, Store
from coordinator.subjects import model_token
from coordinator.tokenizer import Tokenizer
from coordinator.watcher import Watcher
from workers import rank_flags
from workers.engine_link import SHUTDOWN_GRACE_S, EngineLink
from workers.engine_messages import Event, Progress, Ready, SetRole, Stats
from workers.incarnation import Incarnation
from workers.load_progress import LoadProgress
from workers.mock_link import MockLink
from workers.order_book import OrderBook
from workers.settings import EngineSettings, WorkerSettings
from workers.transfer.reach import MODES

log = logging.getLogger(__name__)

Engine = EngineLink | MockLink

RETRY_S = 1.0
CONFIG_STATUS = 2   # starting again would not help
CPU_STALL_S, GPU_STALL_S = 120.0, 60.0  # many times the longest step
# Another rank's end ended the engine: what its jobs are blamed for. Whoever goes on with them may meet the same fault in them.
PEER_BLAME: dict[int, Blame] = {PEER_STATUS[DONE]: "", PEER_STATUS[VANISHED]: "death", PEER_STATUS[CRASHED]: "crash"}
NO_STATS = Stats(free_pages=0, total_pages=0, cached_pages=0, held_pages=0, pinned=0, running=0, waiting=0, importing=0, free_tokens=1)


class EndedWhileLoading(TokenmillError):
    """Nobody's fault here: another rank ended, or we were told to stop. `status` is what this process exits with."""

    def __init__(self, status: int) -> None:
        super().__init__("the engine ended while loading")
        self.status = status


class Worker:
    """An engine and its successive incarnations. `run` returns the process' exit status."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._stopping = asyncio.Event()
        self._failure = ""
        self._blame: Blame = ""
        self._status = 1
        self._loading: Engine | None = None
        self._stats = NO_STATS
        self._incarnation: Incarnation | None = None
        self._role = settings.engine.role
        ranks = settings.engine.ranks
        why_not = f"its {ranks.dp} dp groups step together: SIGTERM to their supervisor drains all of them"
        self._orders = OrderBook(settings.worker_id, self._role, why_not if ranks.moe_mode == "EP" and ranks.dp > 1 else "")

    def stop(self) -> None:
        """Finish or hand back what is here, then leave."""
        self._stopping.set()
        if self._loading is not None:
            self._loading.process.terminate()

    async def run(self) -> int:
        settings = self._settings
        engine: Engine = await (MockLink if settings.engine.engine == "mock" else EngineLink).start(settings.engine)
        tasks: list[asyncio.Task[None]] = []
        try:
            events = engine.events()
            ready = await self._load(engine, events)
            tokenizer = await asyncio.to_thread(Tokenizer.from_dir, settings.engine.model_dir)
            tasks += [asyncio.create_task(self._pump(engine, events)), asyncio.create_task(self._watch(engine, ready))]
            if isinstance(engine, EngineLink) and settings.engine.ranks.tp > 1:
                tasks.append(asyncio.create_task(self._watch_stopped(engine)))
            bus = await Bus.connect(settings.nats_url, name=settings.worker_id, on_fatal=lambda error: self._fail(f"NATS: {error}"))
            store = Store(settings.redis_url, lease_s=settings.lease_s)
            await self._until_provisioned(bus, store)
            watcher = Watcher(bus, store, settings.worker_id)
            watcher.start()
            await self._orders.open(bus)
            settle()
            while not self._stopping.is_set() and not self._orders.is_leaving:
                await self._live(Incarnation(self._under_orders(engine), ready, self._stats, engine, tokenizer, bus, store), ready)
            await self._orders.close()
            await watcher.close()
            await bus.close()
            await store.close()
        finally:
            for task in tasks:
                task.cancel()
            status = await engine.stop(self._engine_grace_s)
        if self._failure:
            log.error("%s", self._failure)
            return self._status
        return status or (DRAINED_STATUS if self._orders.is_leaving and not self._stopping.is_set() else 0)

    def _under_orders(self, engine: Engine) -> WorkerSettings:
        """The settings of the next life: a role that was ordered goes to the engine too, which keeps its weights and its prefix cache."""
        self._orders.came.clear()
        if self._orders.role != self._role:
            self._role = self._orders.role
            engine.send(SetRole(role=self._role))  # type: ignore[arg-type]
        return replace(self._settings, engine=replace(self._settings.engine, role=self._role))

    @property
    def _engine_grace_s(self) -> float:
        """Where dp groups step together an engine ends with the last of them, whose worker may still have jobs to finish."""
        ranks = self._settings.engine.ranks
        are_together = ranks.moe_mode == "EP" and ranks.dp > 1
        return SHUTDOWN_GRACE_S + (self._settings.drain_timeout_s if are_together and not self._failure else 0.0)

    async def _load(self, engine: Engine, events: AsyncIterator[Event]) -> Ready:
        self._loading = engine
        with LoadProgress(self._settings.engine.model_dir) as bar:
            async for event in events:
                if isinstance(event, Progress):
                    bar.update(event.loaded_bytes, event.total_bytes)
                elif isinstance(event, Ready):
                    self._loading = None
                    return event
        self._loading = None
        status = await asyncio.to_thread(engine.process.wait)
        if self._stopping.is_set():
            raise EndedWhileLoading(0)
        if status == CONFIG_STATUS:
            raise ConfigError("the engine refused its settings")  # it said which
        if status in PEER_BLAME:
            raise EndedWhileLoading(status)
        raise TokenmillError(f"the engine ended while loading (status {status})")

    async def _until_provisioned(self, bus: Bus, store: Store) -> None:
        while not self._stopping.is_set():
            try:
                if await bus.provision(model_token(self._settings.engine.model_name), max_queued=self._settings.max_queued or None):
                    await store.found()
                return
            except Unavailable as error:
                log.warning("waiting for NATS and Redis: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _live(self, life: Incarnation, ready: Ready) -> None:
        """One incarnation from registration to retirement."""
        try:
            await life.start()
        except Unavailable as error:
            log.warning("not registered: %s", error)
            await asyncio.sleep(RETRY_S)
            return
        self._incarnation = life
        kind = "MOCK engine, " if ready.device == "mock" else ""
        under = f", under MPS ({life.mps})" if life.mps else ""
        print(f"{life.me.role} worker {life.me.owner} ready: {kind}{self._settings.engine.model_name}, {ready.max_total_tokens} KV tokens"
              f"{under}", file=sys.stderr, flush=True)
        endings = [asyncio.create_task(event.wait()) for event in (self._stopping, life.over, self._orders.came)]
        await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
        for task in endings:
            task.cancel()
        await life.stop_pulling()
        await life.drain(self._settings.drain_timeout_s, lambda: bool(self._failure))
        await life.leave(self._blame)

    async def _pump(self, engine: Engine, events: AsyncIterator[Event]) -> None:
        async for event in events:
            if isinstance(event, Stats):
                self._stats = event
            if self._incarnation is not None:
                self._incarnation.on_event(event)
        status = await asyncio.to_thread(engine.process.wait)
        if status in PEER_BLAME:
            self._fail("the engine ended with its group", PEER_BLAME[status], status)
        else:
            was_killed = status in (-signal.SIGKILL, -signal.SIGTERM)
            self._fail(f"the engine process ended with status {status}", "death" if was_killed else "crash")

    async def _watch(self, engine: Engine, ready: Ready) -> None:
        """An engine that hangs is ended, and is as good as one that crashed: its jobs go back into the queue, each of them a suspect."""
        limit_s = self._settings.engine_stall_s or (CPU_STALL_S if ready.device == "cpu" else GPU_STALL_S)
        await engine.silence(limit_s)
        self._fail(f"the engine process made no progress for {limit_s:g} s: killed", "crash")
        engine.process.kill()

    async def _watch_stopped(self, engine: EngineLink) -> None:
        """A rank that is stopped stops all others, and its group is broken for its silence: it is ended, so that a new one can form."""
        stopped = StoppedFor()
        while True:
            await asyncio.sleep(RETRY_S)
            if stopped.seconds(engine.process.pid) > SILENCE_S:
                engine.process.kill()

    def _fail(self, why: str, blame: Blame = "", status: int = 1) -> None:
        """The first reason counts."""
        if not self._failure:
            self._failure, self._blame, self._status = why, blame, status
        self._stopping.set()


def parse(argv: list[str] | None) -> tuple[WorkerSettings, str]:
    parser = argparse.ArgumentParser(prog="workers.worker", description="One worker: an I/O process and its engine.", allow_abbrev=False)
    add = parser.add_argument
    add("--role", choices=["prefill", "decode", "both"], default="both")
    for flag, name in (("--nats_url", "TOKENMILL_NATS_URL"), ("--redis_url", "TOKENMILL_REDIS_URL")):
        add(flag, default=os.environ.get(name, ""), required=name not in os.environ)   # unseen by others: URLs may carry passwords
    add("--model_dir", required=True)
    add("--model_name", default="default_model_name")
    add("--worker_id", default="")
    add("--engine", choices=["model", "mock"], default="model")
    add("--mock_costs", default="")
    add("--prefix_affinity", choices=["on", "off"], default="off")
    add("--disagg_min_tokens", type=int, default=0)
    add("--handoff_same_host", choices=["on", "off"], default="on")
    add("--device", default="auto")
    add("--data_type", default="auto")
    add("--page_size", type=int, default=0)
    add("--max_total_token_num", type=int, default=0)
    add("--mem_fraction", type=float, default=0.9)
    add("--max_req_total_len", type=int, default=16384)
    add("--running_max_req_size", type=int, default=0)
    add("--chunked_prefill_size", type=int, default=0)
    add("--num_threads", type=int, default=0)
    add("--load_workers", type=int, default=1)
    add("--disable_dynamic_prompt_cache", action="store_true")
    add("--graph_max_batch_size", type=int, default=256)
    add("--disable_cudagraph", action="store_true")
    add("--enable_fa3", action="store_true")
    add("--kv_transfer", choices=MODES, default="auto")
    add("--kv_host", default="")
    add("--max_queued", type=int, default=0, help="jobs per class before producers get 429 (default: the bound that is there)")
    add("--lease_s", type=float, default=5.0, help="a worker silent for this long is taken for dead")
    add("--engine_stall_s", type=float, default=0.0, help="kill an engine silent for this long (default: 60 on a GPU, 120 on a CPU)")
    add("--drain_timeout", type=float, default=30.0)
    add("--log_level", default="warning")
    rank_flags.add(parser)
    flags = parser.parse_args(argv)
    dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    engine = EngineSettings(
        model_dir=flags.model_dir, model_name=flags.model_name, role=flags.role, device=flags.device, engine=flags.engine,
        mock_costs=flags.mock_costs,
        dtype=dtypes.get(flags.data_type, flags.data_type), page_size=flags.page_size, max_total_token_num=flags.max_total_token_num,
        mem_fraction=flags.mem_fraction, max_req_total_len=flags.max_req_total_len, running_max_req_size=flags.running_max_req_size,
        chunked_prefill_size=flags.chunked_prefill_size, load_workers=flags.load_workers, num_threads=flags.num_threads,
        use_prefix_cache=not flags.disable_dynamic_prompt_cache, report_blocks=flags.prefix_affinity == "on",
        graph_max_batch_size=flags.graph_max_batch_size, use_cuda_graphs=not flags.disable_cudagraph, use_fa3=flags.enable_fa3,
        kv_transfer=flags.kv_transfer, kv_host=flags.kv_host or _host_towards(flags.nats_url), ranks=rank_flags.settings(flags))
    worker_id = flags.worker_id or f"{flags.role}-{os.getpid()}"
    return WorkerSettings(nats_url=flags.nats_url, redis_url=flags.redis_url, worker_id=worker_id, engine=engine,
                          drain_timeout_s=flags.drain_timeout, max_queued=flags.max_queued, lease_s=flags.lease_s,
                          engine_stall_s=flags.engine_stall_s, prefix_affinity=flags.prefix_affinity == "on",
                          handoff_same_host=flags.handoff_same_host == "on", serves_local=flags.disagg_min_tokens > 0), flags.log_level


def _host_towards(url: str) -> str:
    """Where whoever reaches the queue at `url` reaches this worker too."""
    server = urlsplit(url.partition(",")[0])
    return address_towards(server.hostname or "127.0.0.1", server.port or 4222) or "127.0.0.1"


async def _run(settings: WorkerSettings) -> int:
    worker = Worker(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.stop)
    return await worker.run()


def main(argv: list[str] | None = None) -> int:
    lifeline.hold_on()
    settings, level = parse(argv)
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_guarded(settings))
    return uvloop.run(_guarded(settings))


async def _guarded(settings: WorkerSettings) -> int:
    try:
        return await _run(settings)
    except EndedWhileLoading as error:
        return error.status
    except TokenmillError as error:
        print(f"worker {settings.worker_id}: {error}", file=sys.stderr)
        return CONFIG_STATUS if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
