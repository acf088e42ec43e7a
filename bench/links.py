"""Rates of the links between GPUs, and what collectives over them take. Measured ones say where; the others are assumptions until they are.

A small message costs its latency, a large one its bytes over the rate: latency + bytes / rate.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Between the GPUs of one group. `bus` is NCCL's bus bandwidth: an all-reduce moves 2 (n - 1) / n times its bytes over it."""

    name: str
    bus_bytes_s: float
    all_reduce_s: float            # latency of a small one
    exchange_bytes_s: float        # of each rank, when tokens travel to experts
    exchange_s: float              # latency of one such exchange
    pair_bytes_s: float            # from one GPU to one other: what a hand-over can use
    source: str

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        return 0.0 if ranks == 1 else self.all_reduce_s + 2 * (ranks - 1) / ranks * num_bytes / self.bus_bytes_s

    def all_gather(self, num_bytes: float, ranks: int) -> float:
        """`num_bytes`: of the whole result."""
        return 0.0 if ranks == 1 else self.all_reduce_s + (ranks - 1) / ranks * num_bytes / self.bus_bytes_s

    def exchange(self, num_bytes: float, ranks: int) -> float:
        """All to all: `num_bytes` leave each rank if none stayed at home."""
        return 0.0 if ranks == 1 else self.exchange_s + (ranks - 1) / ranks * num_bytes / self.exchange_bytes_s


NVLINK = Links(
    name="NVLink, one node", bus_bytes_s=340e9, all_reduce_s=15e-6, exchange_bytes_s=155e9, exchange_s=30e-6, pair_bytes_s=300e9,
    source="all-reduce of 1 GiB over 2 and 4 H100 measured at 329 and 355 GB/s; exchange as DeepEP publishes it for 8 H800; latencies and "
           "the rate of a pair assumed")
TWO_NODES = Links(
    name="two nodes, 400 Gb/s per GPU", bus_bytes_s=180e9, all_reduce_s=40e-6, exchange_bytes_s=85e9, exchange_s=60e-6, pair_bytes_s=45e9,
    source="exchange as DeepEP publishes it for 2 x 8 GPUs with ConnectX-7; the others assumed")
