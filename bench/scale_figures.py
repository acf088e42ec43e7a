"""What a run of the scale bench adds up to. Pure: records and samples in, rows out."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import Row
from bench.summary import percentile

LEAD_IN_S, AFTERMATH_S = 1.0, 8.0     # jobs sent so long before and after a kill are those that might feel it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One job as its master saw it, and as its final record tells (`claimed_s`: Redis' clock at the claim, None without a record)."""

    job_id: str
    sent_s: float
    latency_s: float
    claimed_s: float | None

    @property
    def accepted_s(self) -> float:
        """A job id carries the time when it was made, in its first 48 bits."""
        return (uuid.UUID(self.job_id).int >> 80) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRun:
    jobs: Sequence[Answered]
    num_sent: int
    num_failed: int
    num_wrong: int
    num_records: int
    seconds: float                      # from the first job sent to the last answer
    wanted_rate: float
    redis_commands: int
    redis_inner: int
    coordinator_cpu_s: float            # all coordinators together
    cpu_s: Mapping[str, float] = field(default_factory=dict)
    killed_at: float | None = None      # Unix s
    load_before: float = 0.0            # of the machine, by other work
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def claim_ms(self) -> list[float]:
        return [max(0.0, (job.claimed_s - job.accepted_s) * 1000) for job in self.jobs if job.claimed_s is not None]

    def claims_by_second(self) -> list[tuple[int, int, float, float]]:
        """(second of the run, jobs, p50 ms, p99 ms): whether something got slower on the way."""
        began = min(job.sent_s for job in self.jobs)
        seconds: dict[int, list[float]] = {}
        for job in self.jobs:
            if job.claimed_s is not None:
                seconds.setdefault(int(job.sent_s - began), []).append(max(0.0, (job.claimed_s - job.accepted_s) * 1000))
        return [(at, len(taken), round(percentile(taken, 50), 1), round(percentile(taken, 99), 1)) for at, taken in sorted(seconds.items())]

    def near_kill(self) -> tuple[list[float], list[float]]:
        """Latencies of jobs sent around the kill, and of all others."""
        near: list[float] = []
        others: list[float] = []
        for job in self.jobs:
            is_near = self.killed_at is not None and -LEAD_IN_S <= job.sent_s - self.killed_at <= AFTERMATH_S
            (near if is_near else others).append(job.latency_s)
        return near, others


def rows(run: ScaleRun) -> list[Row]:
    rate, num = len(run.jobs) / run.seconds, max(1, len(run.jobs))
    claims, latencies = run.claim_ms or [0.0], [job.latency_s for job in run.jobs] or [0.0]
    near, others = run.near_kill()
    lost = run.num_sent - len(run.jobs)
    found = [
        Row(name="jobs answered per second", figure=rate, bar=run.wanted_rate * 0.98, unit="/s", higher_is_better=True,
            note=f"{num} jobs in {run.seconds:.1f} s; {sum(run.cpu_s.values()) / run.seconds:.2f} cores used, load of the machine "
                 f"before it {run.load_before:.1f}"),
        Row(name="jobs lost", figure=float(lost), bar=0.0, unit="jobs", higher_is_better=False,
            note=f"{run.num_failed} refused or failed, {run.num_sent} sent"),
        Row(name="answers with a missing, doubled or wrong token", figure=float(run.num_wrong), bar=0.0, unit="jobs",
            higher_is_better=False, note="every token is checked"),
        Row(name="final records beyond one per job", figure=float(run.num_records - num), bar=0.0, unit="records", higher_is_better=False),
        Row(name="claim latency p50", figure=percentile(claims, 50), bar=20.0, unit="ms", higher_is_better=False,
            note="job made by its master to claim granted in Redis"),
        Row(name="claim latency p99", figure=percentile(claims, 99), bar=250.0, unit="ms", higher_is_better=False),
        Row(name="Redis commands per job", figure=run.redis_commands / num, bar=12.0, unit="",
            higher_is_better=False, note=f"round trips, all leases included; {run.redis_inner / num:.0f} more inside scripts"),
        Row(name="coordinators' CPU", figure=100 * run.coordinator_cpu_s / run.seconds, bar=10.0, unit="% of a core",
            higher_is_better=False,
            note="all of them together"),
        Row(name="whole answer p99", figure=percentile(latencies, 99), bar=2.0, unit="s", higher_is_better=False,
            note=f"p50 {percentile(latencies, 50):.2f} s"),
    ]
    if near:
        found.append(Row(
            name="added by the leader's death", figure=max(0.0, max(near) - max(others, default=0.0)), bar=2.0, unit="s",
            higher_is_better=False, note=f"slowest answer around it {max(near):.2f} s, of all others {max(others, default=0.0):.2f} s; "
            f"p99 {percentile(near, 99):.2f} s"))
    return found
