"""The picture of bench.affinity: cached share by turn, first tokens, and who did how much."""

from collections.abc import Sequence
from pathlib import Path

from bench.affinity_figures import Served, by_turn
from bench.plots import figure_of

COLOURS = ("#b23a48", "#2a7f62", "#5b6c8f")


def draw(path: Path, title: str, served: Sequence[Served]) -> bool:
    """False if matplotlib is missing."""
    figure = figure_of(13, 4.2)
    if figure is None:
        return False
    hits, firsts, loads = figure.subplots(1, 3)
    width = 0.8 / len(served)
    for number, (way, colour) in enumerate(zip(served, COLOURS, strict=False)):
        label = f"{way.name}: {100 * way.hit_rate:.0f} %"
        rates = by_turn(way)
        hits.plot([turn + 1 for turn in rates], [100 * rate for rate in rates.values()], marker="o", color=colour, label=label)
        ordered = sorted(way.ttfts_ms)
        firsts.plot(ordered, [100 * (at + 1) / len(ordered) for at in range(len(ordered))], color=colour, label=way.name)
        shares = way.share()
        loads.bar([at + 1 + (number - 1) * width for at in range(len(shares))], shares, width, color=colour, label=way.name)
    hits.set(xlabel="turn of the conversation", ylabel="prompt tokens found cached, %", ylim=(0, 100))
    firsts.set(xlabel="time to first token, ms", ylabel="turns, %", xscale="log")
    loads.set(xlabel="workers, busiest first", ylabel="tokens computed, × mean")
    loads.axhline(1.3, color="black", linewidth=1, linestyle="--")
    for axes in (hits, firsts, loads):
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    return True
