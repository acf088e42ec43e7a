"""How long a call takes on the GPU, without what the host adds: calls are captured in a CUDA graph and the graph is replayed.

Rotating among several input sets, or flushing in between, keeps the L2 cache cold. A call that synchronizes with the host cannot
be captured; it is launched call by call between events, and the figure says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

Call = Callable[[int], object]  # (index of the input set)

LEAST_GRAPH_MS = 1.0            # shorter graphs show the gap before their first kernel
MOST_CALLS = 256                # in one graph
LEAST_REPLAYS, MOST_REPLAYS = 5, 200
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Median microseconds of one call. Not a graph: launch gaps may be part of it."""

    us: float
    is_graph: bool


def time_call(call: Call, num_sets: int = 1, *, budget_s: float = 0.15, flush: bool = False) -> Timing:
    """Time `call` over input sets 0 … num_sets - 1 in turn, for about `budget_s` of GPU time.

    flush   write more than the L2 cache holds before every call (for a single small input set); its own time is taken off
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(num_sets):  # compiles, and fills the allocator
            call(index)
        if not _can_be_captured(call):
            return Timing(_launched_us(call, num_sets, budget_s), is_graph=False)
        if not flush:
            return Timing(_replayed_us(call, num_sets, budget_s), is_graph=True)
        scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

        def flushed(index: int) -> None:
            scratch.zero_()
            call(index)

        both_us = _replayed_us(flushed, num_sets, budget_s)
        return Timing(both_us - _replayed_us(lambda index: scratch.zero_(), 1, budget_s), is_graph=True)


def _can_be_captured(call: Call) -> bool:
    """Found out without a capture: a failed one leaves the allocator and the random generators in a bad state."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return True


def _replayed_us(call: Call, num_sets: int, budget_s: float) -> float:
    graph = _captured(call, num_sets, num_sets)
    graph.replay()
    rough_ms = median(_times_ms(graph.replay, 3))
    rounds = min(max(1, MOST_CALLS // num_sets), max(1, round(LEAST_GRAPH_MS / max(rough_ms, 1e-3))))
    if rounds > 1:
        graph = _captured(call, num_sets, num_sets * rounds)
        graph.replay()
        rough_ms *= rounds
    num_replays = min(MOST_REPLAYS, max(LEAST_REPLAYS, int(budget_s * 1000 / rough_ms)))
    return median(_times_ms(graph.replay, num_replays)) * 1000 / (num_sets * rounds)


def _launched_us(call: Call, num_sets: int, budget_s: float) -> float:
    def round_trip() -> None:
        for index in range(num_sets):
            call(index)

    rough_ms = median(_times_ms(round_trip, 3))
    num_rounds = min(MOST_REPLAYS, max(LEAST_REPLAYS, int(budget_s * 1000 / rough_ms)))
    return median(_times_ms(round_trip, num_rounds)) * 1000 / num_sets


def _captured(call: Call, num_sets: int, num_calls: int) -> torch.cuda.CUDAGraph:
    """`torch.cuda.graph` would collect garbage each time, which takes longer than most measurements here."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()
    try:
        for number in range(num_calls):
            call(number % num_sets)
    finally:
        graph.capture_end()
    return graph


def _times_ms(action: Callable[[], object], count: int) -> list[float]:
    """The actions are queued without waiting in between: after the first, the host is ahead of the GPU."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    marks[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]
