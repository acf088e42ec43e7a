"""`tokenmill mock-fleet`: many workers with mock engines in one process, for scale tests of the control plane and for simulations.

Leases, claims, chains, pages and hand-overs are the real ones. What the workers of a fleet share is this process: its event loop, its
connection to NATS and its pool of connections to Redis.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from coordinator import lifeline
from coordinator.bus import Bus
from coordinator.collector import settle
from coordinator.errors import ConfigError, TokenmillError
from coordinator.store import Store
from coordinator.subjects import model_token
from coordinator.tokenizer import Tokenizer
from coordinator.watcher import Watcher
from workers.mock_costs import MockCosts
from workers.mock_worker import MockWorker
from workers.settings import EngineSettings, WorkerSettings

log = logging.getLogger(__name__)

READY_LOOK_S = 0.05


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tokenmill mock-fleet", description="Many workers without a model: the control plane's load, "
                                     "made-up tokens.", allow_abbrev=False)
    add = parser.add_argument
    add("--nats_url", required=True)
    add("--redis_url", required=True)
    add("--model_dir", required=True, help="folder with config.json and a tokenizer; no weights are read")
    add("--model_name", default="default_model_name")
    add("--workers", type=int, default=0, help="workers of role both")
    add("--prefill_workers", type=int, default=0)
    add("--decode_workers", type=int, default=0)
    add("--name", default="", help="their ids begin with it (default: mock-PID)")
    add("--mock_costs", default="", help="prefill=TOKENS_PER_S,step_ms=…,seq_ms=…,copy_ms=… (default: 20000, 8, 0.05, 0.02)")
    add("--page_size", type=int, default=0, help="tokens of one KV page (default: 16)")
    add("--max_total_token_num", type=int, default=0, help="tokens that each pool holds (default: 65536)")
    add("--max_req_total_len", type=int, default=16384)
    add("--running_max_req_size", type=int, default=0, help="sequences of one worker (default: 64)")
    add("--chunked_prefill_size", type=int, default=0, help="tokens of one prefill step (default: 2048)")
    add("--disable_dynamic_prompt_cache", action="store_true")
    add("--prefix_affinity", choices=["on", "off"], default="off")
    add("--disagg_min_tokens", type=int, default=0, help="above 0: decode workers prefill short prompts that producers send them")
    add("--handoff_same_host", choices=["on", "off"], default="on")
    add("--host", default="", help="pretend to be on a machine of this name")
    add("--no_watcher", action="store_true", help="leave the leases of others to coordinators")
    add("--lease_s", type=float, default=5.0)
    add("--drain_timeout", type=float, default=30.0)
    add("--log_level", default="warning", choices=["debug", "info", "warning", "error"])
    flags = parser.parse_args(argv)
    if min(flags.workers, flags.prefill_workers, flags.decode_workers) < 0 or not _num_workers(flags):
        parser.error("--workers, --prefill_workers and --decode_workers: together at least one worker")
    return flags


def _num_workers(flags: argparse.Namespace) -> int:
    return int(flags.workers + flags.prefill_workers + flags.decode_workers)


def _settings(flags: argparse.Namespace) -> list[WorkerSettings]:
    roles = ["both"] * flags.workers + ["prefill"] * flags.prefill_workers + ["decode"] * flags.decode_workers
    name = flags.name or f"mock-{os.getpid()}"
    return [WorkerSettings(
        nats_url=flags.nats_url, redis_url=flags.redis_url, worker_id=f"{name}-{index}", drain_timeout_s=flags.drain_timeout,
        lease_s=flags.lease_s, prefix_affinity=flags.prefix_affinity == "on", serves_local=flags.disagg_min_tokens > 0,
        handoff_same_host=flags.handoff_same_host == "on", host=flags.host,
        engine=EngineSettings(
            model_dir=flags.model_dir, model_name=flags.model_name, role=role, engine="mock", mock_costs=flags.mock_costs,
            page_size=flags.page_size, max_total_token_num=flags.max_total_token_num, max_req_total_len=flags.max_req_total_len,
            running_max_req_size=flags.running_max_req_size, chunked_prefill_size=flags.chunked_prefill_size,
            use_prefix_cache=not flags.disable_dynamic_prompt_cache, report_blocks=flags.prefix_affinity == "on"))
        for index, role in enumerate(roles)]


async def run(flags: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT, or until NATS closes the connection for good. Raises ConfigError, Unavailable."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    faults: list[Exception] = []

    def on_fatal(error: Exception) -> None:
        faults.append(error)
        stopping.set()

    MockCosts.parse(flags.mock_costs)
    tokenizer = Tokenizer.from_dir(Path(flags.model_dir))
    store = Store(flags.redis_url, lease_s=flags.lease_s)
    async with await Bus.connect(flags.nats_url, name=flags.name or f"mock-{os.getpid()}", on_fatal=on_fatal) as bus:
        if await bus.provision(model_token(flags.model_name)):
            await store.found()
        watcher = Watcher(bus, store, bus.name)
        if not flags.no_watcher:
            watcher.start()
        workers = [MockWorker(settings, tokenizer, bus, store) for settings in _settings(flags)]
        running = [asyncio.create_task(worker.run(stopping)) for worker in workers]
        announcement = asyncio.create_task(_announce(workers, flags.model_name))
        await asyncio.gather(*running)
        announcement.cancel()
        await watcher.close()
    await store.close()
    if faults:
        raise faults[0]


async def _announce(workers: list[MockWorker], model: str) -> None:
    while not all(worker.is_registered for worker in workers):
        await asyncio.sleep(READY_LOOK_S)
    settle()
    print(f"{len(workers)} MOCK workers ready for {model}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    lifeline.hold_on()
    flags = _parse(argv)
    logging.basicConfig(level=flags.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        uvloop.run(run(flags))
    except ConfigError as error:
        print(f"tokenmill mock-fleet: {error}", file=sys.stderr)
        return 2
    except TokenmillError as error:
        print(f"tokenmill mock-fleet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
