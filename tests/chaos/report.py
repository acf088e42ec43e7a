"""The figures of a chaos run: a table for people, JSON and Markdown for the repository."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scenario. The last five must be 0. Recovery is over the jobs that were hit: longest silence, less the undisturbed median."""

    scenario: str
    jobs: int
    strikes: int
    hit: int                  # jobs that were in flight at a strike
    retries: int              # connections that broke or were refused, all jobs together
    held_s: float             # how long the fault itself held on
    recovery_p50_s: float
    recovery_p99_s: float
    lost: int
    duplicated: int
    gaps: int
    different: int
    extra_records: int


COLUMNS = ("scenario", "jobs", "strikes", "hit", "retries", "held_s", "recovery_p50_s", "recovery_p99_s", "lost", "duplicated", "gaps",
           "different", "extra_records")


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column == "scenario" else "right")
    for row in rows:
        table.add_row(*(_cell(getattr(row, column)) for column in COLUMNS))
    Console(width=160).print(table)


def write(rows: Sequence[Row], path: Path, **about: object) -> None:
    """`path`.json and `path`.md; replaces what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{name: None if value != value else value for name, value in asdict(row).items()} for row in rows]  # NaN is not JSON
    path.with_suffix(".json").write_text(json.dumps({**about, "scenarios": plain}, indent=2) + "\n")
    lines = ["# Faults and what they cost", "", *(f"- {name.replace('_', ' ')}: {value}" for name, value in about.items()), "",
             "| " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(getattr(row, column)) for column in COLUMNS) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.2f}"
    return str(value)
