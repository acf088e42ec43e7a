"""Closed-loop load client with the seed's arguments and printed lines.

    python bench/benchmark_client.py --url http://127.0.0.1:8088/generate_stream --tokenizer_path MODEL --num_clients 100
    python -m bench.benchmark_client …

Differences from the seed's: --input_len is honoured, answers other than 200 are counted and reported instead of ending the run, and
every stream is checked (token counts contiguous, exactly as many as asked for, finish flag): only those count as valid.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the checkout, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.closed_loop import Outcome, Run, run_closed_loop
from bench.http_stream import Target
from bench.streams import APIS
from bench.summary import Summary
from bench.workload import make_workload, vocab_size_of

BUSY_CLIENT = 0.9  # of one core: beyond this the client itself may be what is measured


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark_client", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", help="default: http://127.0.0.1:8000 with the path of --server_api")
    parser.add_argument("--num_clients", type=_positive, default=100)
    parser.add_argument("--tokenizer_path", type=Path, help="model or tokenizer folder: keeps token ids inside of its vocabulary")
    parser.add_argument("--input_num", type=_positive, default=2000, help="number of requests")
    parser.add_argument("--input_len", type=_positive, default=1024, help="tokens per prompt, exactly")
    parser.add_argument("--output_len", type=_positive, default=128, help="mean number of output tokens")
    parser.add_argument("--server_api", choices=sorted(APIS), default="lightllm")
    parser.add_argument("--dump_file", default="", help="write the figures to this JSON file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="default_model_name", help="model name for --server_api openai")
    parser.add_argument("--timeout_s", type=float, default=600.0, help="for one whole answer")
    return parser.parse_args([_underscored(argument) for argument in argv])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _underscored(argument: str) -> str:
    """`--num-clients=8` is taken as `--num_clients=8`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


async def run(arguments: argparse.Namespace, console: Console) -> Run:
    api = APIS[arguments.server_api]
    target = Target.parse(arguments.url or f"http://127.0.0.1:8000{api.path}")
    vocab_size = vocab_size_of(arguments.tokenizer_path) if arguments.tokenizer_path else None
    items = make_workload(arguments.input_num, arguments.input_len, arguments.output_len, vocab_size, arguments.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    num_bad = 0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("requests", total=len(items))

        def on_outcome(outcome: Outcome) -> None:
            nonlocal num_bad
            num_bad += not outcome.is_valid
            progress.update(task, advance=1, description=f"requests, {num_bad} bad" if num_bad else "requests")

        limits = {"num_clients": arguments.num_clients, "timeout_s": arguments.timeout_s}
        return await run_closed_loop(target, api, items, model=arguments.model, on_outcome=on_outcome, **limits)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every request was valid, else 1."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    progress_console, console = Console(stderr=True), Console()
    try:
        finished = asyncio.run(run(arguments, progress_console))
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmark_client: {error}", file=sys.stderr)
        return 2
    cpu_share = finished.cpu_s / finished.elapsed_s
    summary = Summary.of(finished)
    print("\n".join(summary.lines()))
    console.print(summary.status_table())
    for detail, count in summary.details.items():
        print(f"{count} × {detail}")
    busy = " (the client itself may be the limit)" if cpu_share > BUSY_CLIENT else ""
    print(f"client CPU: {cpu_share:.0%} of one core{busy}")
    if arguments.dump_file:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        dump = {"settings": settings, **summary.to_json(), "client_cpu_share": cpu_share}
        Path(arguments.dump_file).write_text(json.dumps(dump, indent=2) + "\n", encoding="utf-8")
    return 0 if summary.num_valid == summary.num_requests else 1


if __name__ == "__main__":
    sys.exit(main())
