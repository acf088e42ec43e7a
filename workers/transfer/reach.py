"""Which ways lead from here to a handle's pages. No torch: the I/O process asks, before it lets the engine fetch anything."""

from coordinator.errors import Unreachable
from coordinator.messages import KVRank, KVSource

AUTO, MAPPED, COLLECTIVE = "auto", "mapped", "collective"
MODES = (AUTO, MAPPED, COLLECTIVE)


def ways_to(source: KVSource, host: str, mode: str) -> tuple[KVRank, ...]:
    """The source's ranks with those addresses that mean something on `host` and that `mode` allows. Raises Unreachable."""
    is_here = source.host == host
    ranks = tuple(KVRank(address=rank.address if is_here and mode != COLLECTIVE else "", desk=rank.desk if mode != MAPPED else "")
                  for rank in source.ranks)
    if all(rank.address or rank.desk for rank in ranks):
        return ranks
    if mode == MAPPED:
        why = "its memory cannot be mapped" if is_here else "it is on another host"
        raise Unreachable(source.worker, f"{why}, and this worker has --kv_transfer mapped: use auto or collective here")
    where = "it is on another host" if not is_here else "this worker has --kv_transfer collective" if mode == COLLECTIVE else (
        "its memory cannot be mapped")
    raise Unreachable(source.worker, f"{where}, and it keeps no desk: start it with --kv_transfer auto or collective")
