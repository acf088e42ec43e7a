"""`tokenmill dlq`: look at dead letters, put one back into the queue, or throw it away."""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from coordinator.errors import ConfigError, InvalidField, MalformedMessage, TokenmillError
from coordinator.farm_access import FarmAccess, add_flags, reach
from coordinator.messages import DeadLetter, Job, new_job_id


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tokenmill dlq", description="Jobs that cannot be served: malformed, or withdrawn after their "
                                     "workers died.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, help_text in (("list", "all dead letters of a model, oldest first"), ("show", "one, with its payload"),
                            ("replay", "queue it again as a new job"), ("drop", "delete it")):
        action = actions.add_parser(name, help=help_text)
        if name != "list":
            action.add_argument("seq", type=int, help="its number, as `list` shows it")
        action.add_argument("--json", action="store_true")
        add_flags(action)
    flags = parser.parse_args(argv)
    try:
        return asyncio.run(_run(flags))
    except TokenmillError as error:
        print(f"tokenmill dlq: {error}", file=sys.stderr)
        return 1


async def _run(flags: argparse.Namespace) -> int:
    async with reach(flags) as farm:
        if flags.action == "list":
            _show_all(await _all_letters(farm), as_json=flags.json)
            return 0
        letter = await farm.bus.dlq_get(flags.seq)
        if letter is None:
            raise ConfigError(f"there is no dead letter {flags.seq}")
        if flags.action == "show":
            print(json.dumps(_as_map(flags.seq, letter), indent=2))
        elif flags.action == "drop":
            await farm.bus.dlq_delete(flags.seq)
            print(f"dropped {flags.seq}")
        else:
            job_id = await replay(farm, letter)
            await farm.bus.dlq_delete(flags.seq)
            print(f"queued again as job {job_id}")
    return 0


async def replay(farm: FarmAccess, letter: DeadLetter) -> str:
    """The new job's id. It is a new one: the former has its final record, which says how it ended. Raises ConfigError if it is no job."""
    try:
        job = Job.decode(letter.payload)
    except (MalformedMessage, InvalidField) as error:
        raise ConfigError(f"this letter holds no job that can be served: {error}") from None
    again = replace(job, job_id=new_job_id(), deadline_ms=None)
    await farm.bus.publish_job(again)
    return again.job_id


async def _all_letters(farm: FarmAccess) -> list[tuple[int, DeadLetter]]:
    letters: list[tuple[int, DeadLetter]] = []
    while page := await farm.bus.dlq_list(farm.model, after_seq=letters[-1][0] if letters else 0):
        letters += page
    return letters


def _show_all(letters: list[tuple[int, DeadLetter]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_as_map(seq, letter) for seq, letter in letters], indent=2))
        return
    table = Table(title=f"{len(letters)} dead letters")
    for name in ("seq", "at", "job", "reason"):
        table.add_column(name, overflow="fold")
    for seq, letter in letters:
        table.add_row(str(seq), _time(letter), letter.job_id or "-", letter.reason)
    Console().print(table)


def _as_map(seq: int, letter: DeadLetter) -> dict[str, Any]:
    body = {**asdict(letter), "seq": seq, "at": _time(letter), "payload": letter.payload.hex()}
    try:
        job = asdict(Job.decode(letter.payload))
    except (MalformedMessage, InvalidField):
        return body
    return {**body, "job": job}


def _time(letter: DeadLetter) -> str:
    return datetime.fromtimestamp(letter.at_ms / 1000, UTC).isoformat(timespec="seconds")
