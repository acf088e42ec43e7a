"""Explore the protocol's model: every state within small bounds, or long random walks within large ones.

    python tests/protocol/explore.py --workers 3 --jobs 1 --tokens 2 --crash 1 --lapse 2 --empty 1
    python tests/protocol/explore.py --walks 2000 --workers 4 --jobs 3 --crash 2 --lapse 2 --empty 1 --give 3
    python tests/protocol/explore.py --break no_fence --lapse 1        the shortest way to the damage
"""

import argparse
import gc
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.protocol.model import (
    SWITCHES,
    Faults,
    Setting,
    State,
    Step,
    has_fresh_worker,
    is_clean,
    start,
    steps,
    wrong,
)


@dataclass(frozen=True)
class Report:
    """`problem` is empty when every rule holds; `path` leads to it, by names of steps."""

    num_states: int
    num_clean: int
    seconds: float
    problem: str = ""
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.problem:
            return f"{self.num_states} states in {self.seconds:.1f} s: every rule holds; {self.num_clean} of them finished and clean"
        return f"{self.problem} (after {self.num_states} states, {self.seconds:.1f} s)\n  " + "\n  ".join(self.path)


WORK = ("work", "late")


class TooLarge(Exception):
    """More states than allowed."""


def explore(setting: Setting, max_states: int = 5_000_000, after: Iterable[str] = ()) -> Report:
    """All that may happen, after these steps have. Raises TooLarge.

    Breadth first, so the first violation has a shortest path. Then: can every state in which a fresh worker is left still finish, and
    is nothing held where nothing more is to be done?
    """
    was_collecting = gc.isenabled()
    gc.disable()                            # states are values without cycles, by the hundred thousand
    try:
        return _explore(setting, max_states, follow(setting, after))
    finally:
        if was_collecting:
            gc.enable()


def follow(setting: Setting, names: Iterable[str]) -> State:
    """The state after these steps. Raises ValueError where one of them cannot happen."""
    state = start(setting)
    for name in names:
        options = {step.name: step.state for step in steps(setting, state)}
        if name not in options:
            raise ValueError(f"no step {name!r}, but: {', '.join(options)}")
        state = options[name]
        if (problem := wrong(setting, state)):
            raise ValueError(f"{name}: {problem}")
    return state


def _explore(setting: Setting, max_states: int, first: State) -> Report:
    began = time.perf_counter()
    number: dict[State, int] = {first: 0}
    states: list[State] = [first]
    parents = array("l", [-1])
    edges: list[array[int]] = [array("l")]  # by work alone, backwards: who leads here
    clean: list[int] = []
    resting: list[int] = []                 # nothing but faults can happen

    def report(problem: str = "", at: int = -1) -> Report:
        path = path_to(setting, states, parents, at) if problem else ()
        return Report(len(states), len(clean), time.perf_counter() - began, problem, path)

    at = 0
    while at < len(states):
        state = states[at]
        if is_clean(setting, state):
            clean.append(at)
        is_resting = True
        for step in steps(setting, state):
            is_work = step.kind in WORK
            if is_work:
                is_resting = False
            found = number.get(step.state)
            if found is None:
                found = number[step.state] = len(states)
                states.append(step.state)
                parents.append(at)
                edges.append(array("l"))
                if (problem := wrong(setting, step.state)):
                    return report(problem, found)
                if found > max_states:
                    raise TooLarge(f"more than {max_states} states")
            if is_work:
                edges[found].append(at)
        if is_resting:
            resting.append(at)
        at += 1
    can_finish = reaching(clean, edges)
    for at, state in enumerate(states):
        if not can_finish[at] and has_fresh_worker(setting, state):
            return report(f"stuck: a fresh worker is left, but this cannot finish: {state}", at)
    for at in resting:
        if has_fresh_worker(setting, states[at]) and not is_clean(setting, states[at]):
            return report(f"at rest, but something is held: {states[at]}", at)
    return report()


def reaching(goals: list[int], edges: "list[array[int]]") -> bytearray:
    """Which states can reach a goal."""
    reached = bytearray(len(edges))
    todo = deque(goals)
    for goal in goals:
        reached[goal] = 1
    while todo:
        for before in edges[todo.popleft()]:
            if not reached[before]:
                reached[before] = 1
                todo.append(before)
    return reached


def path_to(setting: Setting, states: list[State], parents: "array[int]", at: int) -> tuple[str, ...]:
    names = []
    while (parent := parents[at]) >= 0:
        names.append(next(step.name for step in steps(setting, states[parent]) if step.state == states[at]))
        at = parent
    return tuple(reversed(names))


def walk(setting: Setting, pick: Callable[[int], int], num_steps: int = 400, fault_share: float = 0.15) -> Report:
    """One long run: any step may come next, faults with that share; then only work, until all is finished and clean.

    `pick(n)` chooses from 0..n-1.
    """
    began = time.perf_counter()
    state, names = start(setting), []
    for count in range(num_steps * 10):
        options = list(steps(setting, state))
        if count >= num_steps:
            options = [step for step in options if step.kind in WORK]
        if not options or (count >= num_steps and is_clean(setting, state)):
            break
        step = choose(options, pick, fault_share)
        state = step.state
        names.append(step.name)
        if (problem := wrong(setting, state)):
            return Report(len(names), 0, time.perf_counter() - began, problem, tuple(names))
    if has_fresh_worker(setting, state) and not is_clean(setting, state):
        return Report(len(names), 0, time.perf_counter() - began, f"never finished: {state}", tuple(names))
    return Report(len(names), int(is_clean(setting, state)), time.perf_counter() - began)


def choose(options: list[Step], pick: Callable[[int], int], fault_share: float) -> Step:
    """A step by the kind of its time: what only happens after some waiting comes seldom while something else can happen."""
    work = [step for step in options if step.kind == "work"]
    late = [step for step in options if step.kind == "late"]
    others = [step for step in options if step.kind not in WORK]
    if others and ((not work and not late) or pick(1000) < fault_share * 1000):
        return others[pick(len(others))]
    if late and (not work or pick(10) == 0):
        return late[pick(len(late))]
    return work[pick(len(work))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Explore the protocol's model (docs/protocol.md).",
                                     epilog="switches: " + "; ".join(f"{name}: {what}" for name, what in SWITCHES.items()))
    for name, default in (("workers", 2), ("jobs", 1), ("tokens", 2), ("decoders", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in Faults._fields:
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--origins", type=int, nargs="*", default=[], help="per job its producer; jobs of one producer share chains")
    parser.add_argument("--joins", action="store_true", help="workers start unregistered")
    parser.add_argument("--break", dest="broken", action="append", default=[], choices=sorted(SWITCHES), metavar="SWITCH")
    parser.add_argument("--walks", type=int, default=0, help="random walks instead of all states")
    parser.add_argument("--fault_share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_states", type=int, default=5_000_000)
    flags = parser.parse_args(argv)
    setting = Setting(workers=flags.workers, jobs=flags.jobs, tokens=flags.tokens, decoders=flags.decoders, joins=flags.joins,
                      origins=tuple(flags.origins), faults=Faults(*(getattr(flags, name) for name in Faults._fields)),
                      broken=frozenset(flags.broken))
    if not flags.walks:
        try:
            report = explore(setting, flags.max_states)
        except TooLarge as error:
            print(f"{error}; no rule was broken in those")
            return 2
        print(report)
        return int(bool(report.problem))
    generator, num_steps, began = random.Random(flags.seed), 0, time.perf_counter()
    for _ in range(flags.walks):
        report = walk(setting, generator.randrange, fault_share=flags.fault_share)
        num_steps += report.num_states
        if report.problem:
            print(report)
            return 1
    print(f"{flags.walks} walks, {num_steps} steps in {time.perf_counter() - began:.1f} s: every rule holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
