"""`tokenmill status`: who is alive, what is queued, what is held. With --json for scripts."""

import argparse
import asyncio
import json
import sys
from typing import Any

from coordinator.bus import Counters
from coordinator.errors import TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
from coordinator.messages import CLASSES
from coordinator.planning import planner_said
from coordinator.registry import registry, worker_row
from coordinator.status_tables import show
from coordinator.store import WorkerView


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill status", description="Who is alive, what is queued, what is held.", allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args(argv)
    try:
        report = asyncio.run(_reach_and_collect(flags))
    except TokenmillError as error:
        print(f"tokenmill status: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2)) if flags.json else show(report)
    return 0


async def _reach_and_collect(flags: argparse.Namespace) -> dict[str, Any]:
    async with reach(flags) as farm:
        return await collect(farm)


async def collect(farm: FarmAccess) -> dict[str, Any]:
    """The farm's counters as one map. At rest `held_pages`, `pinned`, `claims`, `num_ack_pending` and `jobs_depth` are 0."""
    counters, workers = await farm.bus.counters(farm.model), await farm.store.workers(farm.model)
    doors = await registry(farm.store, farm.model)
    return {"model": farm.model, **totals(workers), **depths(counters), "queues": queues(counters), "roles": roles(workers),
            "config_servers": doors["config_servers"], "masters": doors["masters"], "planner": await planner_said(farm.store, farm.model),
            "workers": [worker_row(view) for view in workers]}


def queues(counters: Counters) -> dict[str, dict[str, int]]:
    """By class: waiting for a worker, at work in one. Handles too, under `handoff`."""
    by_class = {klass: {"waiting": counters["jobs_pending"][klass], "at_work": counters["jobs_ack_pending"][klass]} for klass in CLASSES}
    return {**by_class, "handoff": {"waiting": counters["handoff_pending"], "at_work": counters["handoff_ack_pending"]}}


def roles(workers: list[WorkerView]) -> dict[str, int]:
    """Living workers by role; those that are leaving or changing count as draining."""
    counted = {"prefill": 0, "decode": 0, "both": 0, "draining": 0}
    for view in workers:
        if view.is_alive:
            counted["draining" if view.info.get("state") == "draining" else view.role] += 1
    return counted


def totals(workers: list[WorkerView]) -> dict[str, int]:
    alive = [view for view in workers if view.is_alive]
    return {
        "held_pages": sum(int(view.stats.get("held_pages", 0)) for view in alive),
        "pinned": sum(int(view.stats.get("pinned", 0)) for view in alive),
        "running": sum(int(view.stats.get("running", 0)) for view in alive),
        "waiting": sum(int(view.stats.get("waiting", 0)) for view in alive),
        "claims": sum(view.num_owned for view in workers),
    }


def depths(counters: Counters) -> dict[str, int]:
    return {
        "jobs_depth": sum(counters["jobs"].values()),
        "jobs_pending": sum(counters["jobs_pending"].values()),
        "num_ack_pending": sum(counters["jobs_ack_pending"].values()) + counters["handoff_ack_pending"],
        "handoff_depth": counters["handoff"],
        "dlq": counters["dlq"],
    }
