"""How many CPU threads the math of a step gets.

A step of few tokens is hundreds of short parallel regions, and each waits for its slowest thread: one thread that has to share its core
with the queue or the REST shim slows them all, many times over. So such steps leave one core to the rest of the farm. A prefill chunk
is few long regions; it takes all cores.
"""

import os

import torch

MANY_TOKENS = 64      # of one step: from here on it is worth all cores


class CpuThreads:
    """`fixed` 0: as above; else that many for every step. `num_sharing`: processes that divide the cores among them, ranks of one node."""

    def __init__(self, fixed: int = 0, num_sharing: int = 1) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if num_sharing > 1:
            fixed = fixed or max(1, cores // num_sharing)  # steps of all ranks coincide
        self._few = fixed or max(1, cores - 1)
        self._many = fixed or cores
        self._current = 0
        self.choose(1)

    def choose(self, num_tokens: int) -> None:
        """Before a step of so many tokens."""
        wanted = self._many if num_tokens >= MANY_TOKENS else self._few
        if wanted != self._current:
            self._current = wanted
            torch.set_num_threads(wanted)
