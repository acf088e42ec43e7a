"""The farm's own figures in one run on this machine, each beside its bar: `python -m bench.farm --model_dir models/smollm2-135m-instruct`.

Measured: one stream and many against transformers on the same model, time to first token, what a saturating batch in the background costs
those who wait, and what the queue path adds to the first token.
Close other programs first: the figures are ratios taken in turn, but the machine is small.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import background_figures, farm_figures
from bench.engine_peer import running_engine
from bench.farm_process import FarmFailed, running_farm
from bench.http_stream import Target
from bench.machine import describe_machine, machine_line, usable_cores
from bench.report import Row, render_table, write_report
from bench.transformers_peer import TransformersPeer
from bench.workload import vocab_size_of
from coordinator.errors import TokenmillError
from workers.demo_model import fetch_demo
from workers.random_model import write_random_model
from workers.settings import EngineSettings

DEMO_DIR = Path("models/smollm2-135m-instruct")
RESULTS = Path("bench/results/farm_cpu")
SECTIONS = ("single", "many", "first", "batch", "queue")
TITLE = "tokenmill on CPU"
PLAIN_WIDTH = 170  # of the table in a log file
BATCH_REQUESTS = 40   # of a round, alone and beside the batch
TINY_POOL_TOKENS, TINY_MAX_TOKENS = 65_536, 2048


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.farm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_dir", type=Path, default=DEMO_DIR, help="default: %(default)s, fetched if it is not there")
    parser.add_argument("--url", help="measure this server instead of a farm of its own (then without the queue path)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=5, help="of each figure, after one that warms up (default: %(default)s)")
    parser.add_argument("--queue_requests", type=int, default=300, help="for the queue path (default: %(default)s)")
    parser.add_argument("--num_threads", type=int, default=0,
                        help="CPU threads for farm and peer alike (default: what each chooses; transformers takes all cores)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="writes OUT.json, .md, .png (default: %(default)s)")
    return parser.parse_args(argv)


class Bench:
    """One run: its arguments, its prompts (never one twice) and its progress bars."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path, progress: Progress) -> None:
        self._arguments = arguments
        self._scratch = scratch
        self._progress = progress
        self._num_threads = arguments.num_threads

    def run(self) -> list[Row]:
        arguments = self._arguments
        rows: list[Row] = []
        if set(arguments.sections) - {"queue"}:
            with contextlib.nullcontext(arguments.url) if arguments.url else self._farm("farm", arguments.model_dir) as url:
                rows += self._model_rows(url)
        if "queue" in arguments.sections and not arguments.url:
            rows += self._queue_rows()
        return rows

    def _model_rows(self, url: str) -> list[Row]:
        sections, rounds = self._arguments.sections, self._arguments.rounds
        target = Target.parse(url.rstrip("/") + farm_figures.LIGHTLLM.path)
        prompts = farm_figures.Prompts(vocab_size_of(self._arguments.model_dir), self._arguments.seed)
        needs_peer = {"single", "first"} & set(sections)
        peer = TransformersPeer(self._arguments.model_dir, self._num_threads or usable_cores()) if needs_peer else None
        rows: list[Row] = []
        if "single" in sections and peer:
            rows += farm_figures.single_stream(target, peer, prompts, rounds, self._step("single stream", rounds + 1))
        if "many" in sections:
            rows += farm_figures.many_clients(target, prompts, rounds, self._step("many clients", rounds + 1))
        if "first" in sections and peer:
            rows += farm_figures.first_token(target, peer, prompts, 2 * rounds, self._step("first token", 2 * rounds + 1))
        if "batch" in sections:
            rows += asyncio.run(background_figures.beside_batch(url, prompts, rounds, BATCH_REQUESTS, self._step("batch", 2 * rounds)))
        return rows

    def _queue_rows(self) -> list[Row]:
        """A random Llama so small that what is left of a request is the way there and back. One thread for each of the two engines."""
        model_dir = write_random_model(self._scratch / "tiny", "llama")
        prompts = farm_figures.Prompts(vocab_size_of(model_dir), self._arguments.seed)
        num_requests = self._arguments.queue_requests
        step = self._step("queue path", num_requests + num_requests // 10)
        settings = EngineSettings(
            model_dir=str(model_dir), model_name="tiny", role="both", num_threads=1,
            max_total_token_num=TINY_POOL_TOKENS, max_req_total_len=TINY_MAX_TOKENS,
        )  # fmt: skip

        async def measure(url: str) -> list[Row]:
            async with running_engine(settings) as engine:
                return await farm_figures.queue_path(Target.parse(url + farm_figures.LIGHTLLM.path), engine, prompts, num_requests, step)

        flags = ["--max_total_token_num", str(TINY_POOL_TOKENS), "--max_req_total_len", str(TINY_MAX_TOKENS)]
        with self._farm("tiny farm", model_dir, num_threads=1, flags=flags) as url:
            return asyncio.run(measure(url))

    @contextlib.contextmanager
    def _farm(self, name: str, model_dir: Path, num_threads: int = 0, flags: Sequence[str] = ()) -> Iterator[str]:
        task = self._progress.add_task(f"starting the {name}", total=1)
        state_dir = self._scratch / name.replace(" ", "-")
        with running_farm(model_dir, state_dir, num_threads=num_threads or self._num_threads, flags=flags) as url:
            self._progress.update(task, completed=1, description=f"{name} at {url}")
            yield url

    def _step(self, name: str, total: int) -> farm_figures.Step:
        task = self._progress.add_task(name, total=total)
        return lambda: self._progress.advance(task)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every bar is met, 1 if not, 2 if there are no figures."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    machine, console = describe_machine(), Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(machine_line(machine))
    try:
        if arguments.model_dir == DEMO_DIR:
            fetch_demo(DEMO_DIR)
        with tempfile.TemporaryDirectory(prefix="tokenmill-bench-") as folder, Progress(*columns, console=Console(stderr=True)) as progress:
            rows = Bench(arguments, Path(folder), progress).run()
    except (TokenmillError, FarmFailed, farm_figures.InvalidAnswer, FileNotFoundError) as error:
        print(f"bench.farm: {error}", file=sys.stderr)
        return 2
    console.print(render_table(TITLE, rows))
    for path in write_report(arguments.out, TITLE, rows, machine):
        console.print(f"wrote {path}")
    return 0 if all(row.is_met for row in rows) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C: the farm ends with its bench
    sys.exit(main())
