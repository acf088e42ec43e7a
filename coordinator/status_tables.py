"""What `tokenmill status` prints for people: one report (status.py), as tables that fit a terminal."""

import time
from typing import Any

from rich.console import Console
from rich.table import Table

NUM_DECISIONS = 5
HOLDINGS = ("held_pages", "pinned", "claims", "jobs_depth", "num_ack_pending", "handoff_depth", "dlq")


def show(report: dict[str, Any]) -> None:
    """Workers, queues, doors, what is held, and the planner if there is one."""
    console = Console()
    grouped = [row for row in report["workers"] if row["group"]]
    for table in (_workers(report), _ranks(grouped), _queues(report), _doors(report)):
        if table.row_count:
            console.print(table)
    console.print("  ".join(f"{name} {report[name]}" for name in HOLDINGS), soft_wrap=True)
    if report["planner"]:
        _show_planner(console, report["planner"])


def _workers(report: dict[str, Any]) -> Table:
    counted = ", ".join(f"{number} {role}" for role, number in report["roles"].items() if number)
    table = Table(title=f"{report['model']}: {counted or 'no workers'}", caption="pages: held/cached/free")
    for name in ("worker", "role", "lease", "jobs", "run", "wait", "pin", "pages", "done"):
        table.add_column(name, justify="left" if name in ("worker", "role") else "right", no_wrap=name in ("worker", "pages"))
    for row in report["workers"]:
        stats = row["stats"]
        pages = "/".join(str(stats.get(f"{name}_pages", 0)) for name in ("held", "cached", "free"))
        marks = [f"{row['engine'].upper()} engine"] if row["engine"] != "model" else []
        marks += ["MPS"] if row["mps"] else []
        marks += [row["state"]] if row["state"] != "serving" else []
        role = f"{row['role']} ({', '.join(marks)})" if marks else row["role"]
        lease = f"{row['lease_left_s']:.1f} s" if row["alive"] else "lapsed"
        sequences = (str(stats.get(name, 0)) for name in ("running", "waiting", "pinned"))
        table.add_row(row["worker"], role, lease, str(row["claims"]), *sequences, pages, str(row["finished"]))
    return table


def _queues(report: dict[str, Any]) -> Table:
    table = Table("queue", "waiting", "at work", title="queues")
    for name, counted in report["queues"].items():
        table.add_row(name, str(counted["waiting"]), str(counted["at_work"]))
    return table


def _doors(report: dict[str, Any]) -> Table:
    table = Table("door", "url", "state", "open jobs", title="doors")
    for kind in ("config_servers", "masters"):
        for row in report[kind]:
            table.add_row("config server" if kind == "config_servers" else "master", str(row.get("url", "")),
                          "alive" if row["alive"] else "silent", str(row.get("open_jobs", "-")))
    return table


def _show_planner(console: Console, planner: dict[str, Any]) -> None:
    proposal = planner.get("proposal")
    if proposal:
        what = {"none": "nothing to do", "move": f"{proposal['worker']} to {proposal['role']}", "grow": f"one more {proposal['role']}"}
        console.print(f"planner ({planner['mode']}): {what[proposal['kind']]}: {proposal['reason']}; pressure on prefill "
                      f"{proposal['prefill_pressure']:.0%}, on decode {proposal['decode_pressure']:.0%}")
    for entry in planner["decisions"][:NUM_DECISIONS]:
        at = time.strftime("%H:%M:%S", time.localtime(entry["at_s"]))
        console.print(f"  {at}  {entry['worker'] or 'wanted'}: {entry['role']} ({entry['reason']}): {entry['done']}")


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
