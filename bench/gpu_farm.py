"""The whole farm on one or two GPUs under load: `python -m bench.gpu_farm [--model_dir DIR] [--modes normal pd] [--devices A B]`.

    normal   one worker that prefills and decodes
    pd       a pd_master, a prefill worker and a decode worker, on the same GPU or on two: keys and values are handed over
    pair     a pd_master and two workers that prefill and decode, one on each device

100 clients in a closed loop, 1,024 tokens in and 128 out, streaming. Without --model_dir a random checkpoint of DeepSeek-V2-Lite's
shape is drawn on the GPU first. With hand-over, what a second token costs beside a short and a long prompt gives its speed.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.closed_loop import Outcome, Run, run_closed_loop
from bench.farm_process import FarmFailed
from bench.gpu_farm_process import kill_worker, master_urls, running_modes, worker_names
from bench.http_stream import Target
from bench.kernel_result import slug
from bench.machine import describe_machine
from bench.report import Row, write_report
from bench.streams import APIS
from bench.summary import Summary, percentile
from bench.workload import WorkItem, make_workload, vocab_size_of
from workers.model_config import ModelConfig

RESULTS = Path("bench/results")
KILL_PACE_S = 11.0       # `tokenmill serve` takes a worker that dies three times in 20 s for one that a restart does not heal
API = APIS["lightllm"]
MODES = ("normal", "pd", "pair")
PEER = "bar: vLLM 0.26 under 100 clients, 1024/128, on another GPU, an H100 of 3.0 TB/s"
PEER_REQ_S, PEER_TTFT_MS, PEER_TPOT_MS = 30.8, (551.0, 1454.0), (20.5, 23.0)
KILL_GAP_MS = 250.0      # for who was decoding when a prefill worker died
HANDOVER_LENS, HANDOVER_ROUNDS, HANDOVER_OUTPUT = (512, 8192), 8, 8


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_farm", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model_dir", type=Path, help="a checkpoint; one without config.json is written there (default: a new one)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES[:2])
    parser.add_argument("--num_clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=600, help="measured, after one of each client that warms up (default: %(default)s)")
    parser.add_argument("--kill_after_s", type=float, default=2.0, help="from the beginning of a load (default: %(default)s)")
    parser.add_argument("--input_len", type=int, default=1024)
    parser.add_argument("--output_len", type=int, default=128)
    parser.add_argument("--handover_lens", type=int, nargs=2, default=HANDOVER_LENS, help="prompts whose hand-over is timed (%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--devices", nargs=2, help="of prefill and decode, or of the pair (default: --device for both)")
    parser.add_argument("--workers", nargs="*", default=[], metavar="ROLE=GPU,GPU",
                        help="pd: these workers, of as many ranks as they have GPUs, not one of each role (prefill=0,1 decode=2,3)")
    parser.add_argument("--masters", type=int, default=1, help="pd: REST doors, by turns under loads with kills (default: %(default)s)")
    parser.add_argument("--kill", nargs="*", default=[], choices=("prefill", "decode"), help="pd: SIGKILL such a worker under load, too")
    parser.add_argument("--chaos_s", type=float, default=0.0, help="pd: go on killing any worker under load for so long")
    parser.add_argument("--model", default="v2-lite", help="what is drawn: v2-lite or v3-layers:N (default: %(default)s)")
    parser.add_argument("--pool_tokens", type=int, default=150_000, help="KV pool of each worker (default: %(default)s)")
    parser.add_argument("--load_workers", type=int, default=8, help="threads that load weights (default: %(default)s)")
    parser.add_argument("--mps", action="store_true", help="run under the GPU's multi-process service")
    parser.add_argument("--serve_flags", default="", help="further flags for every process of the farm, in one string")
    parser.add_argument("--ready_s", type=float, default=180.0, help="how long a farm may take to be ready (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="what the report's title ends with")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


def load_rows(mode: str, run: Run, arguments: argparse.Namespace) -> list[Row]:
    """Throughput and latencies of one closed loop beside the peer's."""
    summary = Summary.of(run)
    if not summary.num_valid:
        raise FarmFailed(f"{mode}: no valid answer; {summary.statuses} {summary.details}")
    if summary.num_valid < summary.num_requests:
        print(f"{mode}: {summary.num_requests - summary.num_valid} of {summary.num_requests} requests were not valid: {summary.details}")
    load = f"{arguments.num_clients} clients, {arguments.input_len}/{arguments.output_len}"
    streams = [outcome.stream for outcome in run.outcomes if outcome.stream and len(outcome.stream.times) > 1]
    second = [stream.times[1] - stream.times[0] for stream in streams]
    first, token = summary.first_token_time_s, summary.decode_token_time_s
    note = (f"{PEER}; here {summary.output_throughput:,.0f} output tok/s; second token p50 {median(second) * 1e3:.1f} ms, "
            f"p99 {percentile(second, 99) * 1e3:.1f} ms; client busy {run.cpu_s / run.elapsed_s:.0%}")

    def at_most(name: str, value_s: float, bar_ms: float) -> Row:
        return Row(name=f"{mode}: {name}", figure=value_s * 1e3, bar=bar_ms, unit="ms", higher_is_better=False, note=PEER)

    return [
        Row(name=f"{mode}: {load}", figure=summary.qps, bar=PEER_REQ_S, unit="req/s", higher_is_better=True, note=note,
            samples=summary.to_json()),
        at_most("first token p50", first[50], PEER_TTFT_MS[0]), at_most("first token p99", first[99], PEER_TTFT_MS[1]),
        at_most("time per token p50", token[50], PEER_TPOT_MS[0]), at_most("time per token p99", token[99], PEER_TPOT_MS[1]),
    ]  # fmt: skip


def handover_line(target: Target, config: ModelConfig, vocab_size: int, short: int, long: int) -> str:
    """On an idle farm the gap from the first to the second token holds the hand-over. That grows with the prompt; a decode step hardly."""
    gaps = {length: _second_token_s(target, length, vocab_size) for length in (short, long)}
    num_bytes = (long - short) * config.kv_row * config.num_layers * 2
    more_s = gaps[long] - gaps[short]
    rate = f"{num_bytes / more_s / 1e9:.1f} GB/s" if more_s > 0 else "too fast to tell"
    told = ", ".join(f"{gap * 1e3:.1f} ms behind {length} tokens" for length, gap in gaps.items())
    return f"second token {told}: hand-over at {rate} end to end"


def _second_token_s(target: Target, length: int, vocab_size: int) -> float:
    made = make_workload(HANDOVER_ROUNDS, length, HANDOVER_OUTPUT, vocab_size, seed=length)
    items = [WorkItem(item.prompt_ids, HANDOVER_OUTPUT) for item in made]
    outcomes = _load(target, items, 1).outcomes
    return median(outcome.stream.times[1] - outcome.stream.times[0] for outcome in outcomes if outcome.stream)


def _load(target: Target, items: Sequence[WorkItem], num_clients: int) -> Run:
    num_done = 0
    started = time.monotonic()

    def tell(outcome: Outcome) -> None:
        nonlocal num_done
        num_done += 1
        if num_done % 100 == 0:
            print(f"  {num_done} of {len(items)} requests, {time.monotonic() - started:.1f} s", flush=True)

    return asyncio.run(run_closed_loop(target, API, items, num_clients=num_clients, timeout_s=120.0, on_outcome=tell))


def _workload(num: int, vocab_size: int, seed: int, arguments: argparse.Namespace) -> list[WorkItem]:
    """All answers of one length, as the peers were measured; `make_workload`'s own lengths would show in the time per token."""
    items = make_workload(num, arguments.input_len, arguments.output_len, vocab_size, seed=seed)
    return [replace(item, output_len=arguments.output_len) for item in items]


def measure(mode: str, model_dir: Path, state_dir: Path, arguments: argparse.Namespace) -> list[Row]:
    vocab_size, config = vocab_size_of(model_dir), ModelConfig.from_dir(model_dir)
    started = time.monotonic()
    with running_modes(mode, model_dir, state_dir, arguments) as url:
        print(f"{mode}: ready at {url} after {time.monotonic() - started:.1f} s", flush=True)
        target = Target.parse(url + API.path)
        _load(target, _workload(arguments.num_clients, vocab_size, arguments.seed + 1, arguments), arguments.num_clients)
        run = _load(target, _workload(arguments.requests, vocab_size, arguments.seed, arguments), arguments.num_clients)
        rows = load_rows(mode, run, arguments)
        print("\n".join(f"  {row.name}: {row.cells()[1]} (bar {row.cells()[2]}) {row.note}" for row in rows), flush=True)
        if mode == "pd":
            print(f"  {handover_line(target, config, vocab_size, *arguments.handover_lens)}", flush=True)
            items = _workload(2 * arguments.num_clients, vocab_size, arguments.seed + 2, arguments)
            rows += [*kill_rows(state_dir, items, arguments), *chaos_rows(state_dir, items, arguments)]
            print("\n".join(f"  {row.name}: {row.cells()[1]} (bar {row.cells()[2]}) {row.note}" for row in rows[5:]), flush=True)
    return rows


def kill_rows(state_dir: Path, items: Sequence[WorkItem], arguments: argparse.Namespace) -> list[Row]:
    """A load per role, in which such a worker is killed while keys and values are on their way. Nobody may lose anything, and who decodes
    when a prefill worker dies must not notice."""
    rows = []
    for role in arguments.kill:
        victim = next(name for name in worker_names(state_dir) if name.startswith(role))
        run, killed_at = _killed_load(master_urls(state_dir)[0], victim, state_dir, items, arguments)
        summary = Summary.of(run)
        rows.append(Row(name=f"pd: answers over a SIGKILL of {role}", figure=summary.num_valid, bar=len(items), unit="answers",
                        higher_is_better=True, note=str(summary.details or "")))
        if role == "prefill":
            rows += _gap_rows(run, killed_at)
    return rows


def _gap_rows(run: Run, killed_at: float) -> list[Row]:
    streams = [outcome.stream.times for outcome in run.outcomes if outcome.stream and len(outcome.stream.times) > 2]
    gaps = [max(after - before for before, after in pairwise(times[1:])) for times in streams if times[1] < killed_at < times[-1]]
    if not gaps:
        return []
    return [Row(name="pd: longest gap of who was decoding then", figure=1e3 * max(gaps), bar=KILL_GAP_MS, unit="ms",
                higher_is_better=False, note=f"{len(gaps)} streams; between two tokens, the first two left out")]


def chaos_rows(state_dir: Path, items: Sequence[WorkItem], arguments: argparse.Namespace) -> list[Row]:
    """Load after load through one master after the other, in each of which some worker is killed."""
    draw, urls, num_valid, num_asked, notes = random.Random(arguments.seed), master_urls(state_dir), 0, 0, set()
    ends_at = time.monotonic() + arguments.chaos_s
    while time.monotonic() < ends_at:
        time.sleep(KILL_PACE_S)
        url = urls[num_asked // len(items) % len(urls)]
        summary = Summary.of(_killed_load(url, draw.choice(worker_names(state_dir)), state_dir, items, arguments)[0])
        num_valid, num_asked = num_valid + summary.num_valid, num_asked + len(items)
        notes |= {str(summary.details or "")} - {""}
    if not num_asked:
        return []
    return [Row(name=f"pd: answers in {arguments.chaos_s:g} s of chaos", figure=num_valid, bar=num_asked, unit="answers",
                higher_is_better=True, note=f"{num_asked // len(items)} workers killed; {'; '.join(sorted(notes))}".rstrip("; "))]


def _killed_load(url: str, victim: str, state_dir: Path, items: Sequence[WorkItem], arguments: argparse.Namespace) -> tuple[Run, float]:
    """The load, and when the victim was killed in it (time.perf_counter)."""
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.perf_counter())
        kill_worker(state_dir, victim)

    killer = threading.Timer(arguments.kill_after_s, kill)
    killer.start()
    run = _load(Target.parse(url + API.path), items, arguments.num_clients)
    killer.join()
    return run, killed_at[0]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    rows: list[Row] = []
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="tokenmill-gpu-farm-") as folder:
        model_dir, is_ours = _checkpoint(arguments.model_dir, arguments.model)
        machine = {"gpu": _gpu_name(), **describe_machine()}
        try:
            for mode in arguments.modes:
                try:
                    rows += measure(mode, model_dir, Path(folder) / mode, arguments)
                    title = f"tokenmill on GPUs{arguments.label}"
                    for path in write_report(arguments.out / f"farm_{slug(machine['gpu'])}", title, rows, machine):
                        print(f"wrote {path}")
                except Exception:
                    num_failed += 1
                    print(f"{mode} FAILED\n{traceback.format_exc()}", flush=True)
        finally:
            if is_ours:
                shutil.rmtree(model_dir, ignore_errors=True)
    return 1 if num_failed else 0


def _checkpoint(model_dir: Path | None, model: str) -> tuple[Path, bool]:
    """The folder, and whether it has to be deleted in the end. It is written in a process of its own: this one stays off the GPU."""
    if model_dir is not None and (model_dir / "config.json").is_file():
        return model_dir, False
    from multiprocessing import get_context

    with get_context("spawn").Pool(1) as pool:
        return Path(pool.apply(_write, (str(model_dir or ""), model))), model_dir is None


def _write(given: str, model: str) -> str:
    import torch

    from bench.gpu_checkpoint import roomiest, write_checkpoint
    from bench.shapes import named_config

    started = time.monotonic()
    path = Path(given) if given else roomiest(32 << 30) / f"tokenmill-{slug(model)}"
    num_bytes = write_checkpoint(path, named_config(model), torch.device("cuda"))
    print(f"wrote {num_bytes / 1e9:.1f} GB to {path} in {time.monotonic() - started:.1f} s", flush=True)
    return str(path)


def _gpu_name() -> str:
    from bench.ceilings import gpu_state

    return gpu_state().partition(",")[0]


if __name__ == "__main__":
    sys.exit(main())
