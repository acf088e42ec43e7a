"""`tokenmill jobs`: what became of a job, and stop one."""

import argparse
import asyncio
import json
import sys
from typing import Any

from coordinator import subjects
from coordinator.errors import TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
from coordinator.messages import check_id, unpack_ids


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill jobs", description="What became of a job, and stop one.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
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
    job_id = check_id("job_id", flags.job_id)
    async with reach(flags) as farm:
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
