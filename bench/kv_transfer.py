"""How fast keys and values move between two processes: `python -m bench.kv_transfer [--pair auto|same|two|cpu] [--mps]`.

    same   two processes on one GPU: CUDA IPC, and gloo through host memory
    two    two GPUs of one host: CUDA IPC over NVLink, NCCL
    cpu    a memfd, gloo

Handles of DeepSeek-V2-Lite's shape in bf16, pages scattered on both sides, each beside a plain copy of as many bytes in the same run: by
the clock, as a worker waits for it, and on the device alone. Then decode steps of the real engine beside such transfers. On one GPU
everything again under MPS, if its daemon can be started.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.kernel_result import slug
from bench.machine import describe_machine, machine_line
from bench.mps import multi_process_service
from bench.survivor import write_json
from bench.tables import markdown_table

RESULTS = Path("bench/results")
LEAST_SHARE = 0.7          # of a plain copy, where processes share memory
MOST_DISTURBANCE = 0.05    # of a decode step
TRANSFER_HEADINGS = ("setting", "way", "tokens", "MB", "ms", "GB/s", "plain copy GB/s", "share", "on the device GB/s", "plain copy there",
                     "share there", "bar", "met", "bytes right", "first ms")
DECODE_HEADINGS = ("setting", "way", "transfers", "copies", "step alone ms", "beside ms", "more", "bar", "met")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_transfer", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pair", choices=["auto", "same", "two", "cpu"], default="auto", help="auto: two GPUs, or one, or the CPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--no_decode", action="store_true", help="leave out the decode steps beside transfers (31 GB of weights)")
    parser.add_argument("--no_mps", action="store_true", help="leave out the run under MPS")
    parser.add_argument("--limit_s", type=float, default=240.0, help="of each run of the pair (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


def gpus() -> list[str]:
    """Names, asked without touching CUDA: this process stays off the GPUs."""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20,
                               check=True)
        return asked.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def run_worker(setting: str, arguments: Sequence[str], limit_s: float) -> list[dict[str, Any]]:
    """The figures of one run; what it said before it hung or crashed is kept."""
    command = [sys.executable, "-m", "bench.kv_transfer_worker", *arguments]
    print(f"{setting}: {' '.join(command[1:])}", flush=True)
    figures: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        killer = subprocess.Popen([sys.executable, "-c", _KILLER, str(process.pid), str(limit_s)])
        try:
            for line in process.stdout:
                print("  " + line.rstrip(), flush=True)
                with contextlib.suppress(ValueError):
                    figures.append({"setting": setting, **json.loads(line)})
        finally:
            killer.kill()
            killer.wait()
    if process.returncode:
        figures.append({"setting": setting, "kind": "failed", "what": "the run", "why": f"ended with status {process.returncode}"})
    return figures


_KILLER = "import os,signal,sys,time; time.sleep(float(sys.argv[2])); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


def transfer_row(figure: dict[str, Any]) -> list[str]:
    share = figure.get("device_share")
    on_device = [f"{figure['device_gb_s']:.1f}", f"{figure['device_plain_gb_s']:.1f}", f"{share:.0%}"] if share else [""] * 3
    return [figure["setting"], figure["way"], str(figure["tokens"]), f"{figure['bytes'] / 1e6:.0f}", f"{figure['ms']:.3f}",
            f"{figure['gb_s']:.1f}", f"{figure['plain_gb_s']:.1f}", f"{figure['share']:.0%}", *on_device,
            *([f"≥ {LEAST_SHARE:.0%}", "yes" if figure["share"] >= LEAST_SHARE else "NO"] if share else ["", ""]),
            "yes" if figure["right"] else "NO",
            f"{figure['opened_ms']:.0f}"]


def decode_row(figure: dict[str, Any]) -> list[str]:
    return [figure["setting"], figure["way"], figure["pace"], str(figure["copies"]), f"{figure['alone_ms']:.3f}",
            f"{figure['beside_ms']:.3f}", f"{figure['more']:+.1%}", f"≤ {MOST_DISTURBANCE:.0%}",
            "yes" if figure["more"] <= MOST_DISTURBANCE else "NO"]


def render(figures: Sequence[dict[str, Any]], machine: dict[str, str]) -> str:
    parts = ["# KV transfer between two processes", "", machine_line(machine), ""]
    for kind, headings, row in (("transfer", TRANSFER_HEADINGS, transfer_row), ("decode", DECODE_HEADINGS, decode_row)):
        rows = [row(figure) for figure in figures if figure["kind"] == kind]
        if rows:
            parts += [markdown_table(headings, rows), ""]
    parts += [f"- {figure['setting']}: {figure['what']} FAILED: {figure['why']}" for figure in figures if figure["kind"] == "failed"]
    return "\n".join(parts).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    names = gpus()
    pair = arguments.pair if arguments.pair != "auto" else "two" if len(names) > 1 else "same" if names else "cpu"
    needed = {"cpu": 0, "same": 1, "two": 2}[pair]
    if len(names) < needed:
        print(f"--pair {pair} needs {needed} GPUs, nvidia-smi shows {len(names)}", file=sys.stderr)
        return 2
    devices = {"cpu": ("cpu", "cpu"), "same": ("cuda:0", "cuda:0"), "two": ("cuda:1", "cuda:0")}[pair]
    given = ["--device", devices[0], "--source_device", devices[1], "--tokens", *map(str, arguments.tokens)]
    if pair != "cpu" and not arguments.no_decode:
        given.append("--decode")
    label = {"cpu": "CPU", "same": "one GPU", "two": "two GPUs"}[pair]
    machine = {"gpu": f"{needed} × {names[0]}" if needed else "none", **describe_machine()}
    out = arguments.out / f"kv_transfer_{pair}_{slug(names[0] if needed else 'cpu')}"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    figures = run_worker(label, given, arguments.limit_s)
    _write(out, figures, machine)
    if pair == "same" and not arguments.no_mps:
        with multi_process_service() as is_up:
            figures += run_worker(f"{label}, MPS", given, arguments.limit_s) if is_up else [
                {"setting": f"{label}, MPS", "kind": "failed", "what": "MPS", "why": "its daemon did not start"}]
        _write(out, figures, machine)
    print("\n" + render(figures, machine))
    return 1 if any(figure["kind"] == "failed" for figure in figures) else 0


def _write(out: Path, figures: Sequence[dict[str, Any]], machine: dict[str, str]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), {"machine": machine, "figures": list(figures)})
    out.with_suffix(".md").write_text(render(figures, machine), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
