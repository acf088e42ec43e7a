"""Pictures of figures. matplotlib is optional: without it nothing is drawn and the caller is told so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GOOD, FAIR, POOR = "#2a7f62", "#c58f2b", "#b23a48"
FAIR_SHARE, GOOD_SHARE = 0.5, 0.75


@dataclass(frozen=True, slots=True)
class Bar:
    """`share` of the roofline that is reached, 1 at best."""

    name: str
    share: float
    note: str


def draw_bars(path: Path, title: str, bars: Sequence[Bar]) -> bool:
    """Shares of the roofline, one bar each. False if matplotlib is missing or there is nothing to draw."""
    if not bars or (figure := figure_of(11, 1.4 + 0.27 * len(bars))) is None:
        return False
    axes = figure.subplots()
    drawn = list(reversed(bars))
    places = range(len(drawn))
    colours = [GOOD if bar.share >= GOOD_SHARE else FAIR if bar.share >= FAIR_SHARE else POOR for bar in drawn]
    patches = axes.barh(places, [bar.share for bar in drawn], color=colours)
    axes.set_yticks(places, [bar.name for bar in drawn], fontsize=7)
    axes.bar_label(patches, [f"{bar.share:.0%}  {bar.note}" for bar in drawn], padding=3, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(0, max(1.0, *(bar.share for bar in drawn)) * 1.45)
    axes.set_xlabel("share of the roofline (floor / measured)")
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=110)
    return True


def draw_lines(path: Path, title: str, panels: Mapping[str, Mapping[str, Mapping[float, float]]], x_name: str) -> bool:
    """One panel for each title: its lines by name, each x -> y. Both axes logarithmic. False if nothing could be drawn."""
    if not panels or (figure := figure_of(5.5 * len(panels), 4.4)) is None:
        return False
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            is_floor = label.startswith("floor")
            axes.plot(list(points), list(points.values()), marker="" if is_floor else "o", linestyle="--" if is_floor else "-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x_name)
        axes.set_title(name, fontsize=9)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    return True


def figure_of(width: float, height: float):  # type: ignore[no-untyped-def]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
