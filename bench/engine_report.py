"""The engine's figures as files: JSON, Markdown and a picture, all but the picture written again after every figure."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engine_figures import EngineFigure
from bench.plots import draw_lines
from bench.survivor import write_json
from bench.tables import figure, markdown_table

HEADINGS = ("what", "case", "ms", "tok/s", "GPU ms", "floor ms", "with gaps", "of floor", "experts", "note")


class EngineReport:
    """OUT/name.json, .md and .png. Figures of an earlier run that this run does not take again are kept."""

    def __init__(self, out: Path, name: str, machine: dict[str, Any]) -> None:
        self._path = out / f"{name}.json"
        self._machine = machine
        self._figures: dict[tuple[str, str], EngineFigure] = {(f.kind, f.name): f for f in _older(self._path)}

    def add(self, figure: EngineFigure) -> None:
        self._figures[figure.kind, figure.name] = figure
        self.write(is_drawn=False)

    def write(self, *, is_drawn: bool = True) -> list[Path]:
        figures = sorted(self._figures.values(), key=lambda each: each.kind)
        write_json(self._path, {"machine": self._machine, "figures": [each.to_json() for each in figures]})
        self._path.with_suffix(".md").write_text(markdown(self._machine, figures), encoding="utf-8")
        written = [self._path, self._path.with_suffix(".md")]
        picture = self._path.with_suffix(".png")
        title = f"{self._machine.get('model', '')} on {self._machine.get('gpu', '')}"
        if is_drawn and draw_lines(picture, title, panels(figures), "batch or tokens"):
            written.append(picture)
        return written


def markdown(machine: dict[str, Any], figures: Sequence[EngineFigure]) -> str:
    said = "".join(f"- {key}: {value}\n" for key, value in machine.items())
    return f"# Engine\n\n{said}\n" + markdown_table(HEADINGS, [cells(each) for each in figures])


def cells(each: EngineFigure) -> tuple[str, ...]:
    share = f"{each.share:.0%}" if each.share else "–"
    return (each.kind, each.name, figure(each.step_ms, 4), figure(each.tok_s, 4), figure(each.gpu_ms, 4), figure(each.floor_ms, 4),
            figure(each.launch_floor_ms, 4), share, figure(each.experts), each.note)


def panels(figures: Sequence[EngineFigure]) -> dict[str, dict[str, dict[float, float]]]:
    """Tokens per second over batch size and over chunk size, each beside its floor."""
    made: dict[str, dict[str, dict[float, float]]] = {}
    for each in sorted(figures, key=lambda each: each.batch):
        kind, _, peer = each.kind.partition(" by ")
        if kind not in ("decode", "prefill"):
            continue
        x = float(each.batch if kind == "decode" else each.batch * each.context)
        lines = made.setdefault(f"{kind}, tok/s", {})
        label = f"{peer or 'tokenmill'}" + (f", context {each.context}" if kind == "decode" else "")
        lines.setdefault(label, {})[x] = each.tok_s
        floor = each.launch_floor_ms or each.floor_ms
        if floor:
            lines.setdefault(f"floor, {label}", {})[x] = each.tok_s * each.step_ms / floor
    return made


def _older(path: Path) -> list[EngineFigure]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return [EngineFigure(**{name: value for name, value in entry.items() if name != "share"}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []
