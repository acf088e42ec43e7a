"""`tokenmill jobs`: what is open, what became of a job, and stop one."""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator import subjects
from coordinator.errors import TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
from coordinator.messages import check_id, unpack_ids
from coordinator.open_jobs import OpenJob, open_jobs

DEFAULT_LIMIT = 100


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill jobs", allow_abbrev=False,
                                     description="What is open, what became of a job, and stop one.")
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="jobs of all models that are not over, oldest first (what was published past the shims: "
                                 "once a worker has it)")
    listing.add_argument("--state", choices=["queued", "running"], help="only these")
    listing.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help="at most so many; 0: all (default: %(default)s)")
    listing.add_argument("--json", action="store_true")
    add_flags(listing)
    for name, help_text in (("show", "its state, owner and answer, as JSON"), ("cancel", "stop it, wherever it is")):
        action = actions.add_parser(name, help=help_text)
        action.add_argument("job_id")
        add_flags(action)
    flags = parser.parse_args(argv)
    try:
        return asyncio.run(_run(flags))
    except TokenmillError as error:
        print(f"tokenmill jobs: {error}", file=sys.stderr)
        return 1


async def _run(flags: argparse.Namespace) -> int:
    if flags.action == "list":
        async with reach(flags, needs_model=False) as farm:
            _show(await open_jobs(farm.store), flags)
        return 0
    job_id = check_id("job_id", flags.job_id)
    async with reach(flags, needs_model=False) as farm:
        if flags.action == "show":
            shown = await describe(farm, job_id)
            print(json.dumps(shown, indent=2))
            return 0 if shown["state"] != "unknown" else 1
        is_open = await farm.store.cancel(job_id)
        await farm.bus.publish(subjects.cancel(job_id))
        await farm.bus.flush()
        print("cancelled" if is_open else "it is over already")
    return 0


async def describe(farm: FarmAccess, job_id: str) -> dict[str, Any]:
    """The final record if there is one, else what Redis knows: state queued (given back), owned or unknown (also: not pulled yet)."""
    record = await farm.bus.get_result(job_id)
    if record is not None:
        return {"job_id": job_id, "state": "done", "reason": record.reason, "error": record.error, "text": record.text,
                "num_tokens": len(unpack_ids(record.token_ids)), "prompt_tokens": record.prompt_tokens, "workers": list(record.workers)}
    known = await farm.store.job(job_id)
    return {"job_id": job_id, "state": known.get("state", "unknown"), **{name: known[name] for name in ("owner", "epoch", "cancelled")
                                                                          if name in known}}


def _show(jobs: list[OpenJob], flags: argparse.Namespace) -> None:
    chosen = [job for job in jobs if flags.state in (None, job.state)]
    shown = chosen[: flags.limit or None]
    if flags.json:
        print(json.dumps([asdict(job) for job in shown], indent=2))
        return
    table = Table(caption=f"{len(shown)} of {len(chosen)} open jobs" if len(shown) < len(chosen) else None)
    for name in ("job", "state", "class", "age", "tokens", "owner", "tenant"):
        table.add_column(name, justify="right" if name in ("age", "tokens") else "left", no_wrap=name == "job")
    for job in shown:
        table.add_row(job.job_id, "cancelled" if job.is_cancelled else job.state, job.klass or "?", f"{job.age_s:.1f} s",
                      str(job.tokens or "?"), job.owner or "-", job.tenant or "-")
    Console().print(table)
