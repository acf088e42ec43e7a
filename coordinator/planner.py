"""Which worker should change its role: a pure function over a snapshot of one model's workers, queues and latencies. No clock, no I/O.

Two pressures are compared, each 1 at the edge of the objectives:

    prefill   how long jobs wait before anybody has them, and the time to the first token, against the TTFT objective
    decode    the time per token (as clients see it, and the steps of the decode workers) against the TPOT objective; how long what was
              prefilled waits to be taken, and how full the decode workers' KV pools are

Jobs that wait while finished prefills wait too are no want of prefill: prefill workers stop pulling when nobody takes what they have made.
A move is proposed when one side is over its edge and the other would stay below it with one worker less. Both over: the farm is too small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

OVER = 1.0               # pressure from which a side needs help
SPARE = 0.8              # pressure up to which the other side, with one worker less, may come
FULL_POOL = 0.9          # share of KV pages in use that counts as the edge

Kind = Literal["none", "move", "grow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """One serving worker. `pool_used` is the share of its KV pages that its jobs hold or are promised; `step_s` 0 while nothing runs."""

    worker: str
    role: str
    num_running: int = 0
    pool_used: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One model at one moment. Ages are of the oldest that waits, 0 when nothing does; latencies are 90th percentiles of the last minute,
    0 when nothing ended.
    """

    workers: tuple[WorkerLoad, ...]
    queue_age_s: float = 0.0          # of jobs that no worker has yet, classes interactive and normal
    handoff_age_s: float = 0.0        # of finished prefills that no decode worker has taken
    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What the farm promises."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1
    min_prefill: int = 1
    min_decode: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """`move`: this worker to that role. `grow`: that role wants a worker more, and none can be spared. `reason` is for people."""

    kind: Kind
    worker: str = ""
    role: str = ""
    reason: str = ""
    prefill_pressure: float = 0.0
    decode_pressure: float = 0.0


def propose(snapshot: Snapshot, objectives: Objectives) -> Proposal:
    """One step towards the objectives, or none."""
    prefills = [load for load in snapshot.workers if load.role == "prefill"]
    decodes = [load for load in snapshot.workers if load.role == "decode"]
    prefill, why_prefill = _prefill_pressure(snapshot, objectives)
    decode, why_decode = _decode_pressure(snapshot, decodes, objectives)
    if prefill <= OVER and decode <= OVER:
        return _proposal("none", "", "", "within the objectives", prefill, decode)
    needs, why = ("prefill", why_prefill) if prefill > decode else ("decode", why_decode)
    givers, pressure = (decodes, decode) if needs == "prefill" else (prefills, prefill)
    least = objectives.min_decode if needs == "prefill" else objectives.min_prefill
    if len(givers) <= least:
        return _proposal("grow", "", needs, f"{why}; no {_other(needs)} worker can be spared", prefill, decode)
    expected = pressure * len(givers) / (len(givers) - 1)
    if expected > SPARE:
        return _proposal("grow", "", needs, f"{why}; with one worker less {_other(needs)} would be at {expected:.0%}", prefill, decode)
    mover = min(givers, key=lambda load: (load.num_running, load.pool_used, load.worker))
    return _proposal("move", mover.worker, needs, f"{why}; {_other(needs)} is at {pressure:.0%}", prefill, decode)


def _prefill_pressure(snapshot: Snapshot, objectives: Objectives) -> tuple[float, str]:
    if _handoff_pressure(snapshot, objectives) > OVER:
        return 0.0, "prefill waits for decode"
    return max((snapshot.queue_age_s / objectives.ttft_s, f"a job has waited {snapshot.queue_age_s:.1f} s"),
               (snapshot.ttft_s / objectives.ttft_s, f"time to first token is {snapshot.ttft_s:.2f} s"))


def _decode_pressure(snapshot: Snapshot, decodes: Sequence[WorkerLoad], objectives: Objectives) -> tuple[float, str]:
    step_s = max((load.step_s for load in decodes), default=0.0)
    pool = sum(load.pool_used for load in decodes) / len(decodes) if decodes else 0.0
    return max((snapshot.tpot_s / objectives.tpot_s, f"time per token is {snapshot.tpot_s * 1000:.0f} ms"),
               (step_s / objectives.tpot_s, f"a decode step takes {step_s * 1000:.0f} ms"),
               (_handoff_pressure(snapshot, objectives), f"a finished prefill has waited {snapshot.handoff_age_s:.1f} s"),
               (pool / FULL_POOL, f"KV pools of decode are {pool:.0%} full"))


def _handoff_pressure(snapshot: Snapshot, objectives: Objectives) -> float:
    """The second token should not come later than the first one may."""
    return snapshot.handoff_age_s / objectives.ttft_s


def _other(role: str) -> str:
    return "decode" if role == "prefill" else "prefill"


def _proposal(kind: Kind, worker: str, role: str, reason: str, prefill: float, decode: float) -> Proposal:
    return Proposal(kind=kind, worker=worker, role=role, reason=reason, prefill_pressure=prefill, decode_pressure=decode)


@dataclass(slots=True)
class Hysteresis:
    """Lets a move through only when it was proposed `rounds` times in a row, and none was made in the last `rest_s`."""

    rounds: int = 3
    rest_s: float = 30.0
    _role: str = ""
    _num_seen: int = 0
    _moved_at: float = float("-inf")

    def passes(self, proposal: Proposal, now_s: float) -> bool:
        """True: carry it out now."""
        if proposal.kind != "move":
            self._role, self._num_seen = "", 0
            return False
        self._num_seen = self._num_seen + 1 if proposal.role == self._role else 1
        self._role = proposal.role
        if self._num_seen < self.rounds or now_s - self._moved_at < self.rest_s:
            return False
        self._moved_at, self._num_seen = now_s, 0
        return True
