"""`tokenmill queue`: the queue of a config server or a pd_master, which outlives it when it is killed. Show it; stop it."""

import argparse
import sys
from pathlib import Path

from coordinator import kept_queue
from coordinator.errors import ConfigError, TokenmillError
from coordinator.queue_record import FILE, read_record


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill queue", description="The queue that a config server or a pd_master started.",
                                     allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (("show", "where it is, and whether it runs (no passwords)"), ("stop", "end it in order; what is queued stays")):
        actions.add_parser(name, help=text).add_argument("--state_dir", required=True, help="as given to serve (default there: ./state/…)")
    flags = parser.parse_args(argv)
    try:
        return _run(flags.action, Path(flags.state_dir).absolute())
    except TokenmillError as error:
        print(f"tokenmill queue: {error}", file=sys.stderr)
        return 1


def _run(action: str, state_dir: Path) -> int:
    record = read_record(state_dir / FILE)
    if record is None:
        raise ConfigError(f"there is no {FILE} in {state_dir}: no queue was ever started there")
    is_running = kept_queue.runs(record.pid, state_dir)
    if action == "stop":
        kept_queue.stop(record.pid, state_dir)
        print("stopped" if is_running else "it was not running")
        return 0
    print(f"{'running, keeper ' + str(record.pid) if is_running else 'not running'}; NATS {record.host}:{record.nats_port}, "
          f"Valkey {record.host}:{record.redis_port}, {'a user per role' if record.passwords else 'open, no cluster token'}")
    return 0 if is_running else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
