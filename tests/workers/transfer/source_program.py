"""A source rank in a process of its own: `kind num_pages tp_size rank device width`. Prints its two addresses; each line of input is a
salt to fill the pool with anew, answered when that is done."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.workers.transfer.pools import fill, make_pool
from workers.transfer.desk import Desk


def main() -> None:
    kind, num_pages, tp_size, rank, device, width = sys.argv[1:]
    pool = make_pool(kind, int(num_pages), int(tp_size), int(rank), device, width=int(width))
    desk = Desk(pool, "127.0.0.1", silence_s=2.0)
    print(json.dumps({"address": pool.address, "desk": desk.address}), flush=True)
    for line in sys.stdin:
        fill(pool, kind, int(tp_size), int(rank), int(line))
        print("filled", flush=True)


main()
