"""How long decode steps take, seen from the I/O process by when their tokens arrive."""

import time

SMOOTHING = 0.1
FORGET_S = 10.0          # nothing runs any more


class StepClock:
    """A moving average over the pauses between steps that had a sequence in common: else the pause was for want of work."""

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._mean_s = 0.0
        self._goes_on = False

    def tick(self, goes_on: bool) -> None:
        """Tokens of a step came; `goes_on`: some sequence of it has not ended, so the next step follows at once."""
        now = time.monotonic()
        pause_s, self._last_s = now - self._last_s, now
        if self._goes_on:
            self._mean_s += (pause_s - self._mean_s) * (SMOOTHING if self._mean_s else 1.0)
        self._goes_on = goes_on

    @property
    def step_s(self) -> float:
        """0 while nothing runs."""
        return self._mean_s if time.monotonic() - self._last_s < FORGET_S else 0.0
