"""How long the engine's steps take, seen from the I/O process by when their tokens arrive."""

import time

SMOOTHING = 0.1
LONGEST_PAUSE_S = 2.0    # tokens further apart are not of consecutive steps
FORGET_S = 10.0          # nothing runs any more


class StepClock:
    """A moving average over consecutive steps."""

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._mean_s = 0.0

    def tick(self) -> None:
        """Tokens of a step came."""
        now = time.monotonic()
        pause_s, self._last_s = now - self._last_s, now
        if pause_s < LONGEST_PAUSE_S:
            self._mean_s += (pause_s - self._mean_s) * (SMOOTHING if self._mean_s else 1.0)

    @property
    def step_s(self) -> float:
        """0 while nothing runs."""
        return self._mean_s if time.monotonic() - self._last_s < FORGET_S else 0.0
