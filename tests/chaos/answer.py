"""What one client saw of one job: every token with its index and its time."""

import time
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.workload import Spec


@dataclass(slots=True)
class Answer:
    """Filled by a client while it reads. Times are of time.monotonic."""

    spec: Spec
    job_id: str
    began_at: float = field(default_factory=time.monotonic)
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)     # of tokens
    reason: str = ""                                        # how it ended; "" while it runs
    ended_at: float = 0.0
    violations: list[str] = field(default_factory=list)     # what no client may ever see
    num_retries: int = 0                                    # connections that broke, or were refused

    def take(self, index: int, token_id: int, text: str) -> None:
        """The next token, as a reader got it."""
        if index != len(self.token_ids):
            self.violations.append(f"token {index} came where {len(self.token_ids)} was due")
            return
        self.token_ids.append(token_id)
        self.texts.append(text)
        self.arrivals.append(time.monotonic())

    def end(self, reason: str) -> None:
        if self.reason:
            self.violations.append(f"ended twice: {self.reason}, then {reason}")
        self.reason = reason
        self.ended_at = time.monotonic()

    @property
    def longest_silence_s(self) -> float:
        """Between two pieces of news, the start and the end included."""
        times = [self.began_at, *self.arrivals, self.ended_at]
        return max(later - earlier for earlier, later in pairwise(times))

    def silence_over(self, at: float) -> float:
        """The longest silence that lies, at least partly, after `at`."""
        times = [self.began_at, *self.arrivals, self.ended_at]
        return max((later - earlier for earlier, later in pairwise(times) if later > at), default=0.0)
