"""The keeper of a farm's own queue: NATS and Valkey in the care of a process that outlives whoever started it.

A config server (or the only pd_master) that is killed must not take the queue down. So it starts this process, in a session of its own and
on no lifeline, and finds it again by `queue.json` when it comes back. SIGTERM ends keeper and servers in order; if the keeper itself is
killed, its servers end with it, and whoever watches it starts another one on the same ports, passwords and data.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from coordinator.cluster_token import ENV
from coordinator.embedded import Access, EmbeddedServices
from coordinator.errors import TokenmillError
from coordinator.queue_record import FILE, QueueRecord, passwords_for, read_record

log = logging.getLogger(__name__)


class Keeper:
    """Starts both servers, writes the record, brings back what dies, until `stopping` is set."""

    def __init__(self, flags: argparse.Namespace, has_token: bool) -> None:
        self.stopping = threading.Event()
        self._flags = flags
        last = read_record(Path(flags.state_dir) / FILE)
        self._access = Access(host=flags.host, passwords=passwords_for(last, has_token), tls_cert=flags.tls_cert, tls_key=flags.tls_key)
        self._services = EmbeddedServices(
            flags.state_dir, flags.nats_port or (last.nats_port if last else 0), flags.redis_port or (last.redis_port if last else 0),
            nats_monitor_port=flags.nats_monitor_port or None, on_exit=self._restart, access=self._access)

    def run(self) -> None:
        """Raises ConfigError: ports taken, no binaries, another keeper on this directory."""
        services, access = self._services, self._access
        with services:
            QueueRecord(host=access.host, nats_port=services.nats.port, redis_port=services.redis.port, pid=os.getpid(),
                        passwords=access.passwords, nats_scheme="tls" if access.tls_cert else "nats").write(
                            services.state_dir / FILE)
            self.stopping.wait()

    def _restart(self, name: str, status: int) -> None:
        """Called from a thread of the server that ended; tries until it runs again."""
        log.warning("%s ended with status %d: started again", name, status)
        self._services.server(name).bring_back(self.stopping)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="coordinator.queue_keeper", description="Keep NATS and Valkey running.", allow_abbrev=False)
    parser.add_argument("--state_dir", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--nats_port", type=int, default=0)
    parser.add_argument("--redis_port", type=int, default=0)
    parser.add_argument("--nats_monitor_port", type=int, default=0, help="0: none")
    parser.add_argument("--tls_cert", default="")
    parser.add_argument("--tls_key", default="")
    flags = parser.parse_args(argv)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        keeper = Keeper(flags, bool(os.environ.get(ENV)))
        signal.signal(signal.SIGTERM, lambda number, frame: keeper.stopping.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        keeper.run()
    except TokenmillError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
