"""The planner on a workload that drifts, in virtual time: from long prompts to long answers and back. `python -m bench.planner_sim`

Two farms get the same requests: in one the roles stay, in the other coordinator/planner.py looks every two seconds as it does in a config
server, and what passes its hysteresis is carried out: the worker drains, then goes on in the other role.
"""

import argparse
import random
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench.machine import describe_machine, machine_line
from bench.plots import figure_of
from bench.report import Row, render_table, write_report
from bench.summary import percentile
from bench.virtual_farm import VirtualClock, VirtualJob
from bench.virtual_pd import PdFarm, PdWorker
from coordinator.planner import Hysteresis, Objectives, Snapshot, WorkerLoad, propose
from workers.mock_costs import MockCosts

RESULTS = Path("bench/results/planner_sim")
LOOK_S, WINDOW_S = 2.0, 60.0
COSTS = MockCosts(prefill=8_000, step_ms=25, seq_ms=1.0, copy_ms=0.05)
OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.08)
LOWEST_ID = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Requests of one kind, `rate` a second, for so long; the next phase's come in by degrees over its first minute."""

    name: str
    seconds: float
    rate: float
    prompt_tokens: int
    output_tokens: int


PHASES = (
    Phase(name="mixed", seconds=300, rate=6.0, prompt_tokens=2000, output_tokens=150),
    Phase(name="long prompts", seconds=600, rate=7.5, prompt_tokens=5000, output_tokens=40),
    Phase(name="long answers", seconds=600, rate=6.0, prompt_tokens=500, output_tokens=500),
    Phase(name="mixed again", seconds=300, rate=6.0, prompt_tokens=2000, output_tokens=150),
)
DRIFT_S = 60.0


@dataclass(slots=True)
class Look:
    """The farm at one moment: 90th percentiles of what ended in the last minute, and who does what."""

    at_s: float
    ttft_s: float
    tpot_s: float
    num_prefill: int
    is_switching: bool


@dataclass(slots=True)
class Story:
    name: str
    looks: list[Look] = field(default_factory=list)
    jobs: list[VirtualJob] = field(default_factory=list)
    moves: list[tuple[float, str, str, str]] = field(default_factory=list)    # when, who, to which role, why

    def share_inside(self, objectives: Objectives) -> float:
        """Of all jobs, those whose first token and whose tokens came in time."""
        inside = sum(job.first_token_s - job.sent_s <= objectives.ttft_s and job.tpot_s <= objectives.tpot_s for job in self.jobs)
        return inside / len(self.jobs)

    def is_inside_at_end(self, objectives: Objectives, end_s: float) -> bool:
        """In the last look before `end_s`."""
        look = [look for look in self.looks if look.at_s <= end_s][-1]
        return look.ttft_s <= objectives.ttft_s and look.tpot_s <= objectives.tpot_s


def requests(phases: Sequence[Phase], seed: int) -> list[VirtualJob]:
    """Poisson arrivals; lengths vary by half around what the phase says."""
    draw, now_s, jobs = random.Random(seed), 0.0, list[VirtualJob]()
    ends = [sum(phase.seconds for phase in phases[:index + 1]) for index in range(len(phases))]
    while True:
        index = next((index for index, end_s in enumerate(ends) if now_s < end_s), len(phases))
        if index == len(phases):
            return jobs
        began_s = ends[index] - phases[index].seconds
        is_old = index > 0 and draw.random() > (now_s - began_s) / DRIFT_S
        phase = phases[index - 1 if is_old else index]
        now_s += draw.expovariate(phase.rate)
        prompt_len = int(phase.prompt_tokens * draw.uniform(0.5, 1.5))
        first_id = LOWEST_ID + len(jobs)      # no two prompts begin alike: nothing is found cached
        jobs.append(VirtualJob(job_id=f"job-{len(jobs)}", prompt=range(first_id, first_id + prompt_len), sent_s=now_s,
                               num_output=max(2, int(phase.output_tokens * draw.uniform(0.5, 1.5)))))


def play(name: str, jobs: Sequence[VirtualJob], *, num_prefill: int, num_decode: int, with_planner: bool) -> Story:
    story, clock, ended = Story(name), VirtualClock(), deque[VirtualJob]()
    roles = {f"w{index}": "prefill" if index < num_prefill else "decode" for index in range(num_prefill + num_decode)}

    def on_ended(job: VirtualJob) -> None:
        story.jobs.append(job)
        ended.append(job)

    farm = PdFarm(clock, COSTS, roles, on_ended)
    hysteresis = Hysteresis()
    end_s = jobs[-1].sent_s

    def look() -> None:
        while ended and clock.now_s - ended[0].ended_s > WINDOW_S:
            ended.popleft()
        ttfts, tpots = [job.first_token_s - job.sent_s for job in ended], [job.tpot_s for job in ended]
        ttft_s, tpot_s = (percentile(values, 90) if values else 0.0 for values in (ttfts, tpots))
        serving = [worker for worker in farm.workers if not worker.is_draining]
        story.looks.append(Look(clock.now_s, ttft_s, tpot_s, sum(worker.role == "prefill" for worker in serving),
                                len(serving) < len(farm.workers)))
        if with_planner:
            proposal = propose(Snapshot(
                workers=tuple(map(_load, serving)), ttft_s=ttft_s, tpot_s=tpot_s,
                queue_age_s=clock.now_s - farm.waiting[0].sent_s if farm.waiting else 0.0,
                handoff_age_s=clock.now_s - farm.handles[0].at_s if farm.handles else 0.0), OBJECTIVES)
            if hysteresis.passes(proposal, clock.now_s):
                story.moves.append((clock.now_s, proposal.worker, proposal.role, proposal.reason))
                next(worker for worker in farm.workers if worker.name == proposal.worker).switch(proposal.role)
        if clock.now_s < end_s:
            clock.call_at(clock.now_s + LOOK_S, look)

    for job in jobs:
        clock.call_at(job.sent_s, lambda job=job: farm.send(job))  # type: ignore[misc]
    clock.call_at(LOOK_S, look)
    clock.run()
    return story


def _load(worker: PdWorker) -> WorkerLoad:
    num_running, free_tokens, all_tokens = worker.scheduler_stats
    return WorkerLoad(worker=worker.name, role=worker.role, num_running=num_running, pool_used=1.0 - free_tokens / all_tokens,
                      step_s=worker.step_s)


def rows(fixed: Story, planned: Story, *, phases: Sequence[Phase]) -> list[Row]:
    ends = [sum(phase.seconds for phase in phases[:index + 1]) for index in range(len(phases))]
    found = [Row(
        name="jobs inside both objectives", figure=100 * planned.share_inside(OBJECTIVES), bar=100 * fixed.share_inside(OBJECTIVES),
        unit="%", higher_is_better=True, note=f"bar: roles fixed. {len(planned.moves)} moves; first token within {OBJECTIVES.ttft_s:g} s, "
                                    f"{1000 * OBJECTIVES.tpot_s:g} ms per token")]
    for phase, end_s in zip(phases, ends, strict=True):
        kept = fixed.is_inside_at_end(OBJECTIVES, end_s)
        found.append(Row(
            name=f"inside at the end of “{phase.name}”", figure=float(planned.is_inside_at_end(OBJECTIVES, end_s)), bar=1.0, unit="",
            higher_is_better=True, note="roles fixed: " + ("inside too" if kept else "outside")))
    found.append(Row(name="jobs that did not end", figure=float(len(fixed.jobs) - len(planned.jobs)), bar=0.0, unit="jobs",
                     higher_is_better=False, note=f"{len(planned.jobs)} ended"))
    return found


def draw(path: Path, title: str, stories: Sequence[Story], phases: Sequence[Phase]) -> bool:
    """False if matplotlib is missing."""
    figure = figure_of(11, 8)
    if figure is None:
        return False
    panels = figure.subplots(3, 1, sharex=True)
    for story, colour in zip(stories, ("#b23a48", "#2a7f62"), strict=True):
        times = [look.at_s / 60 for look in story.looks]
        panels[0].plot(times, [max(0.01, look.ttft_s) for look in story.looks], color=colour, label=story.name)
        panels[1].plot(times, [1000 * look.tpot_s for look in story.looks], color=colour, label=story.name)
        panels[2].step(times, [look.num_prefill for look in story.looks], where="post", color=colour, label=story.name)
    panels[0].axhline(OBJECTIVES.ttft_s, color="black", linestyle="--", linewidth=1)
    panels[1].axhline(1000 * OBJECTIVES.tpot_s, color="black", linestyle="--", linewidth=1)
    panels[0].set(ylabel="first token, p90, s", yscale="log")
    panels[1].set(ylabel="time per token, p90, ms")
    panels[2].set(ylabel="prefill workers", xlabel="minutes")
    began_s = 0.0
    for phase in phases:
        for axes in panels:
            axes.axvline(began_s / 60, color="grey", linewidth=0.8)
            axes.grid(True, alpha=0.25)
        panels[0].text(began_s / 60 + 0.2, panels[0].get_ylim()[1] * 0.6, phase.name, fontsize=8)
        began_s += phase.seconds
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.planner_sim", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefill", type=int, default=4, help="workers of this role at the start (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="of all phases' lengths (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="writes OUT.json, .md, .png (default: %(default)s)")
    flags = parser.parse_args(argv)
    phases = [Phase(name=p.name, seconds=p.seconds * flags.scale, rate=p.rate, prompt_tokens=p.prompt_tokens, output_tokens=p.output_tokens)
              for p in PHASES]
    stories = [play(name, requests(phases, flags.seed), num_prefill=flags.prefill, num_decode=flags.decode, with_planner=with_planner)
               for name, with_planner in (("roles fixed", False), ("planner", True))]
    found = rows(*stories, phases=phases)
    title = f"The planner in simulation: {flags.prefill} prefill and {flags.decode} decode workers at the start, a workload that drifts"
    Console(width=150).print(render_table(title, found))
    for at_s, worker, role, reason in stories[1].moves:
        print(f"{at_s / 60:5.1f} min  {worker} to {role}: {reason}")
    found[0].samples["moves"] = stories[1].moves
    write_report(flags.out, title, found, describe_machine())
    draw(flags.out.with_suffix(".png"), f"{title}\n{machine_line(describe_machine())}", stories, phases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
