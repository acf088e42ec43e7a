"""One coordinator of the scale bench: the watch over leases and nothing else, in a process whose CPU time can be read."""

import argparse
import asyncio
import signal
import sys

import uvloop

from coordinator import lifeline
from coordinator.bus import Bus
from coordinator.store import Store
from coordinator.watcher import Watcher


async def _run(flags: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    store = Store(flags.redis_url)
    async with await Bus.connect(flags.nats_url, name=flags.name) as bus:
        watcher = Watcher(bus, store, flags.name)
        watcher.start()
        await stopping.wait()
        await watcher.close()
    await store.close()


def main() -> int:
    lifeline.hold_on()
    parser = argparse.ArgumentParser(prog="bench.scale_coordinator")
    for name in ("nats_url", "redis_url", "name"):
        parser.add_argument(f"--{name}", required=True)
    uvloop.run(_run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
