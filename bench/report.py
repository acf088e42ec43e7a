"""Figures beside the bars they must meet: as a table, as Markdown, as JSON and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.machine import machine_line

HEADINGS = ("what", "figure", "bar", "met", "ratio", "how")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure and its bar. `ratio` above 1 is better than the bar, whichever way the figure counts."""

    name: str
    figure: float
    bar: float
    unit: str
    higher_is_better: bool
    note: str = ""
    samples: dict[str, Any] = field(default_factory=dict)  # what the figure was made of: kept in the JSON only

    @property
    def is_met(self) -> bool:
        return self.figure >= self.bar if self.higher_is_better else self.figure <= self.bar

    @property
    def ratio(self) -> float:
        above, below = (self.figure, self.bar) if self.higher_is_better else (self.bar, self.figure)
        return above / below if below > 0 else float("inf")

    def cells(self) -> tuple[str, ...]:
        sign = "≥" if self.higher_is_better else "≤"
        figure, bar = f"{self.figure:.2f} {self.unit}", f"{sign} {self.bar:g} {self.unit}"
        ratio = f"{self.ratio:.2f}×" if self.ratio != float("inf") else "–"
        return self.name, figure, bar, "yes" if self.is_met else "NO", ratio, self.note

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "figure": self.figure, "unit": self.unit, "bar": self.bar, "higher_is_better": self.higher_is_better,
            "met": self.is_met, "ratio": self.ratio if self.ratio != float("inf") else None, "note": self.note, "samples": self.samples,
        }  # fmt: skip


def render_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(*HEADINGS, title=title)
    for row in rows:
        table.add_row(*row.cells(), style=None if row.is_met else "bold red")
    return table


def render_markdown(title: str, rows: Sequence[Row], machine: dict[str, str]) -> str:
    lines = [f"# {title}", "", machine_line(machine), "", _markdown_row(HEADINGS), "|" + "---|" * len(HEADINGS)]
    lines += [_markdown_row(row.cells()) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_report(out: Path, title: str, rows: Sequence[Row], machine: dict[str, str]) -> list[Path]:
    """Writes `out`.json, .md and (where matplotlib is installed) .png; returns what was written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out.with_suffix(".json"), out.with_suffix(".md")]
    content = {"title": title, "machine": machine, "rows": [row.to_json() for row in rows]}
    written[0].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    written[1].write_text(render_markdown(title, rows, machine), encoding="utf-8")
    picture = out.with_suffix(".png")
    if _draw(picture, title, rows, machine):
        written.append(picture)
    return written


def _draw(path: Path, title: str, rows: Sequence[Row], machine: dict[str, str]) -> bool:
    """Bars of the ratio to each bar: past the line at 1 is met. False if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 1.4 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = list(reversed(rows))
    most = max((row.ratio for row in drawn if row.ratio != float("inf")), default=1.0)
    widths = [min(row.ratio, most) for row in drawn]
    bars = axes.barh([row.name for row in drawn], widths, color=["#2a7f62" if row.is_met else "#b23a48" for row in drawn])
    axes.bar_label(bars, [f"{cells[1]}  (bar {cells[2]})" for cells in (row.cells() for row in drawn)], padding=4, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, most * 1.6)
    axes.set_xlabel("times better than the bar")
    axes.set_title(f"{title}\n{machine_line(machine)}", fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
    return True
