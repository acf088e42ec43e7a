"""A source in a process of its own, all its ranks: `kind num_pages tp_size device width`. Prints each rank's two addresses; a line of
input is a salt to fill the pools with anew, answered when that is done."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.workers.transfer.pools import fill, make_pool
from workers.transfer.desk import Desk


def main() -> None:
    kind, num_pages, tp_size, device, width = sys.argv[1:]
    pools = [make_pool(kind, int(num_pages), int(tp_size), rank, device, width=int(width)) for rank in range(int(tp_size))]
    desks = [Desk(pool, "127.0.0.1", silence_s=2.0) for pool in pools]
    print(json.dumps([{"address": pool.address, "desk": desk.address} for pool, desk in zip(pools, desks, strict=True)]), flush=True)
    for line in sys.stdin:
        for rank, pool in enumerate(pools):
            fill(pool, kind, int(tp_size), rank, int(line))
        print("filled", flush=True)


main()
