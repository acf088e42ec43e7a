"""`tokenmill status`: who is alive, what is queued, what is held. With --json for scripts."""

import argparse
import asyncio
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.bus import Counters
from coordinator.errors import TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
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
    print(json.dumps(report, indent=2)) if flags.json else _show(report)
    return 0


async def _reach_and_collect(flags: argparse.Namespace) -> dict[str, Any]:
    async with reach(flags) as farm:
        return await collect(farm)


async def collect(farm: FarmAccess) -> dict[str, Any]:
    """The farm's counters as one map. At rest `held_pages`, `pinned`, `claims`, `num_ack_pending` and `jobs_depth` are 0."""
    counters, workers = await farm.bus.counters(farm.model), await farm.store.workers(farm.model)
    return {"model": farm.model, **totals(workers), **depths(counters), "workers": [_row(view) for view in workers]}


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


def _row(view: WorkerView) -> dict[str, Any]:
    info = view.info
    return {"worker": view.worker, "incarnation": view.incarnation, "role": view.role, "engine": info.get("engine", "model"),
            "alive": view.is_alive,
            "lease_left_s": round(view.expires_in_s, 1), "claims": view.num_owned, "host": info.get("host", ""), "pid": info.get("pid", 0),
            "finished": info.get("finished", 0), "stats": view.stats, "group": info.get("group")}


def _show(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"workers of {report['model']}")
    for name in ("worker", "role", "lease", "claims", "running", "waiting", "pinned", "pages held / cached / free", "finished"):
        table.add_column(name, justify="left" if name in ("worker", "role") else "right")
    for row in report["workers"]:
        stats = row["stats"]
        pages = f"{stats.get('held_pages', 0)} / {stats.get('cached_pages', 0)} / {stats.get('free_pages', 0)}"
        lease = f"{row['lease_left_s']:.1f} s" if row["alive"] else "lapsed"
        role = row["role"] if row["engine"] == "model" else f"{row['role']} ({row['engine'].upper()} engine)"
        table.add_row(row["worker"], role, lease, str(row["claims"]), str(stats.get("running", 0)), str(stats.get("waiting", 0)),
                      str(stats.get("pinned", 0)), pages, str(row["finished"]))
    console.print(table)
    if grouped := [row for row in report["workers"] if row["group"]]:
        console.print(_ranks(grouped))
    rest = Table(title="queue and holdings")
    rest.add_column("what")
    rest.add_column("count", justify="right")
    for name, value in report.items():
        if isinstance(value, int):
            rest.add_row(name, str(value))
    console.print(rest)


def _ranks(rows: list[dict[str, Any]]) -> Table:
    """Where each rank of the workers that have several runs."""
    table = Table(title="ranks")
    for name in ("worker", "tp / dp / MoE", "dp rank", "generation", "rank", "host", "pid"):
        table.add_column(name)
    for row in rows:
        group = row["group"]
        first = [row["worker"], f"{group['tp']} / {group['dp']} / {group['moe_mode']}", str(group["dp_rank"]), str(group["generation"])]
        for rank in group["ranks"]:
            table.add_row(*first, str(rank["rank"]), rank["host"], str(rank["pid"]))
            first = ["", "", "", ""]
    return table
