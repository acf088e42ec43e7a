"""How much a worker may pull now. Pulling is the reservation: it asks only for what it has room for.

Background jobs give way in the engine (scheduler.py): what they hold there is no reason to leave others in the queue, so the upper
classes have room beside each other only, and the last class has what is left.
"""

from collections.abc import Callable

from workers.active_job import Phase
from workers.engine_messages import Ready, Stats
from workers.jobs import Jobs

MAX_PULL = 16
MAX_IMPORTS = 8         # a full worker would hoard what others could run
KEPT_TOKENS = 1 / 8     # of the pool: what background jobs leave free
MAX_OFFERED = 8         # background jobs whose pages are pinned for a taker: these give way to nobody, so more of them are not begun


class Room:
    """`is_fresh`: whether the worker's lease lets it take anything. `stats`: the engine's newest."""

    def __init__(self, jobs: Jobs, ready: Ready, is_fresh: Callable[[], bool], stats: Callable[[], Stats]) -> None:
        self._jobs = jobs
        self._ready = ready
        self._is_fresh = is_fresh
        self._stats = stats

    def for_jobs(self) -> int:
        """Jobs of the upper classes."""
        return min(self._slots_for_jobs(background=False), MAX_PULL)

    def for_background_jobs(self) -> int:
        return self._slots_for_jobs(background=True)

    def for_handles(self) -> int:
        """Handles of the upper classes."""
        return min(self._slots_for_handles(background=False), MAX_IMPORTS)

    def for_background_handles(self) -> int:
        return self._slots_for_handles(background=True)

    def _slots_for_jobs(self, *, background: bool) -> int:
        """Free slots; none while more prompt tokens wait than two steps compute."""
        if not self._may_take(background) or self._jobs.num_waiting_tokens(background=background) >= 2 * self._ready.chunk_size:
            return 0
        if background and self._num_background_in(Phase.OFFERED) >= MAX_OFFERED:
            return 0
        return self._free_slots(background)

    def _slots_for_handles(self, *, background: bool) -> int:
        if not self._may_take(background) or self._jobs.num_in(Phase.IMPORTING, background=background) >= MAX_IMPORTS:
            return 0
        return self._free_slots(background)

    def _free_slots(self, background: bool) -> int:
        return self._ready.max_num_seqs - self._jobs.num_in(Phase.RUNNING, Phase.CLAIMING, Phase.IMPORTING, background=background)

    def _may_take(self, background: bool) -> bool:
        if not self._is_fresh():
            return False
        free_tokens = self._stats().free_tokens
        if background:
            return free_tokens > KEPT_TOKENS * self._ready.max_total_tokens
        return free_tokens > 0 or self._num_background_in(Phase.RUNNING) > 0

    def _num_background_in(self, phase: Phase) -> int:
        return self._jobs.num_in(phase) - self._jobs.num_in(phase, background=False)
