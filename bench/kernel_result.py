"""One kernel at one size as it was measured: its distance from the roofline and from its bar, and how both are written."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.plots import Bar, draw_bars
from bench.survivor import write_json
from bench.tables import figure, markdown_table

HEADINGS = ("kernel", "shape", "µs", "floor µs", "of floor", "GB/s", "TFLOPS", "bar", "met", "error", "others µs")
BAR = re.compile(r"(>=|<=|≥|≤)\s*([\d.,]+)\s*(GB/s|TB/s|TFLOPS|TFLOP/s|us|µs|ms)")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResult:
    """`us` None: it failed, and `failure` says why. `peers` maps a name to microseconds or to what went wrong."""

    kernel: str
    shape: str
    num_bytes: int
    num_flops: int
    floor_us: float
    bar: str = ""
    us: float | None = None
    is_graph: bool = True
    relative_error: float | None = None
    max_error: float = 1e-2
    peers: dict[str, float | str] = field(default_factory=dict)
    failure: str = ""

    @property
    def share(self) -> float | None:
        """Of the roofline: 1 is the floor itself."""
        return self.floor_us / self.us if self.us else None

    @property
    def gb_s(self) -> float | None:
        return self.num_bytes / self.us / 1e3 if self.us else None

    @property
    def tflops(self) -> float | None:
        return self.num_flops / self.us / 1e6 if self.us and self.num_flops else None

    @property
    def is_right(self) -> bool:
        return not self.failure and (self.relative_error is None or self.relative_error <= self.max_error)

    @property
    def is_met(self) -> bool | None:
        """None without a bar that can be read."""
        wanted = BAR.search(self.bar)
        if wanted is None or self.us is None:
            return None
        limit = float(wanted[2].replace(",", ""))
        value = {"GB/s": self.gb_s, "TB/s": (self.gb_s or 0.0) / 1e3, "TFLOPS": self.tflops, "TFLOP/s": self.tflops, "us": self.us,
                 "µs": self.us, "ms": self.us / 1e3}[wanted[3]]
        if value is None or not self.is_right:
            return False
        return value >= limit if wanted[1] in (">=", "≥") else value <= limit

    def cells(self) -> tuple[str, ...]:
        met = {None: "", True: "yes", False: "NO"}[self.is_met]
        error = self.failure or (f"{self.relative_error:.1e}" if self.relative_error is not None else "–")
        if not self.failure and not self.is_right:
            error = f"WRONG: {error} > {self.max_error:.0e}"
        peers = ", ".join(f"{name} {figure(us) if isinstance(us, float) else us}" for name, us in self.peers.items())
        share = f"{self.share:.0%}" if self.share else "–"
        time = figure(self.us) + ("" if self.is_graph else " (launched)")
        rates = figure(self.gb_s, 4), figure(self.tflops)
        return (self.kernel, self.shape, time, figure(self.floor_us), share, *rates, self.bar, met, error, peers)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "gb_s": self.gb_s, "tflops": self.tflops, "is_met": self.is_met}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "KernelResult":
        derived = ("share", "gb_s", "tflops", "is_met")
        return cls(**{name: value for name, value in entry.items() if name not in derived})

    def line(self) -> str:
        """For the terminal, while the run goes on."""
        kernel, shape, *rest = self.cells()
        named = [f"{name} {cell}" for name, cell in zip(HEADINGS[2:], rest, strict=True) if cell and cell != "–"]
        return f"{kernel} / {shape}: " + ", ".join(named)


def slug(text: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def write_results(out: Path, name: str, machine: dict[str, Any], results: Sequence[KernelResult], *, is_drawn: bool = True) -> list[Path]:
    """OUT/name.json, .md and (with matplotlib) .png. Older results of other cases in that JSON file are kept."""
    path = out / f"{name}.json"
    merged = {(result.kernel, result.shape): result for result in (*_older(path), *results)}
    ordered = [merged[key] for key in sorted(merged, key=lambda key: key[0])]
    write_json(path, {"machine": machine, "cases": [result.to_json() for result in ordered]})
    said = [f"{key}: {value}" for key, value in machine.items()]
    table = markdown_table(HEADINGS, [result.cells() for result in ordered])
    path.with_suffix(".md").write_text("# Kernels\n\n" + "\n".join(f"- {line}" for line in said) + "\n\n" + table, encoding="utf-8")
    bars = [Bar(f"{result.kernel} / {result.shape}", result.share, f"{figure(result.us)} µs") for result in ordered if result.share]
    written = [path, path.with_suffix(".md")]
    if is_drawn and draw_bars(path.with_suffix(".png"), f"Kernels on {machine.get('gpu', '')}", bars):
        written.append(path.with_suffix(".png"))
    return written


def _older(path: Path) -> list[KernelResult]:
    try:
        return [KernelResult.from_json(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["cases"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
