"""The whole engine on one GPU beside its roofline: `python -m bench.engine [--model v2-lite] [--peers] [--out bench/results]`.

Random weights of the published shapes, made on the device. Steps go through the real scheduler, sampler and executor; only the
channel to the I/O process is missing. Decode is measured on sequences that come with their keys and values, prefill on prompts.
`--model v3-layers:N` measures N layers of DeepSeek-V3's shape in FP8, all with experts; its times are those of N layers.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import engine_figures
from bench.ceilings import ceilings_line, gpu_name, gpu_state, measure_ceilings
from bench.device_weights import RandomWeights
from bench.engine_figures import Bench, EngineFigure
from bench.engine_loop import Executor, Prompts
from bench.engine_report import EngineReport
from bench.kernel_result import slug
from bench.machine import describe_machine
from bench.shapes import named_config
from bench.survivor import first_line
from workers.model_config import ModelConfig

RESULTS = Path("bench/results")
PAGE_SIZE, CHUNK_SIZE, MAX_NUM_SEQS = 64, 8192, 256
SPARE_TOKENS = 192                  # that a decoding sequence grows by while it is measured
SECTIONS = ("decode", "prefill", "latency", "offline")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="v2-lite", help="v2-lite or v3-layers:N (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=60, help="timed decode steps of each figure (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=400, help="of the offline figure (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="draw the likeliest token; random weights then soon repeat themselves")
    parser.add_argument("--no_graphs", action="store_true", help="launch every kernel of a decode step by itself")
    parser.add_argument("--peers", action="store_true", help="measure transformers on the same weights' shape as well")
    parser.add_argument("--limit_s", type=float, default=500.0, help="no new figure is begun after so many seconds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return parser.parse_args(argv)


class Run:
    """One run: its clock, its report, and what went wrong so far. A figure that fails is told about and left out."""

    def __init__(self, arguments: argparse.Namespace, report: EngineReport) -> None:
        self._started = time.monotonic()
        self._limit_s = arguments.limit_s
        self._report = report
        self.num_failed = 0

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", flush=True)

    def take(self, what: str, measure: Callable[[], EngineFigure]) -> None:
        if time.monotonic() - self._started > self._limit_s:
            self.say(f"{what}: left out, the time is over")
            return
        try:
            figure = measure()
        except Exception as error:
            self.num_failed += 1
            self.say(f"{what} FAILED: {first_line(error)}")
            print(traceback.format_exc(limit=-6), flush=True)
            return
        self.say(figure.line())
        self._report.add(figure)


def measure_all(run: Run, bench: Bench, arguments: argparse.Namespace) -> None:
    """Cheap and telling figures first."""
    for context in arguments.contexts if "decode" in arguments.sections else []:
        for batch in arguments.batches:
            run.take(f"decode {batch} x {context}", lambda b=batch, c=context: engine_figures.decode(bench, b, c))  # type: ignore[misc]
    for chunk in reversed(arguments.chunks) if "prefill" in arguments.sections else []:
        run.take(f"prefill {chunk}", lambda c=chunk: engine_figures.prefill(bench, c))  # type: ignore[misc]
    if "latency" in arguments.sections:
        run.take("latency", lambda: engine_figures.latency(bench))
    if "offline" in arguments.sections:
        run.take("offline", lambda: engine_figures.offline(bench, arguments.requests))


@contextmanager
def running_executor(config: ModelConfig, arguments: argparse.Namespace, num_pages: int, say: Callable[[str], None]) -> Iterator[Executor]:
    """The engine's executor with random weights and noise in its pool; its memory is free again behind the block."""
    from workers.cuda_executor import CudaExecutor  # only a GPU has it

    device = torch.device("cuda")
    weights = RandomWeights(config, torch.bfloat16, device)
    say(f"drawing {weights.num_bytes / 1e9:.1f} GB of weights")
    executor = CudaExecutor(config, weights, device=device, dtype=torch.bfloat16, num_pages=num_pages, page_size=PAGE_SIZE,
                            max_num_seqs=MAX_NUM_SEQS, chunk_size=CHUNK_SIZE, graph_max_batch_size=MAX_NUM_SEQS,
                            use_cuda_graphs=not arguments.no_graphs)
    say("weights are there; compiling and capturing")
    executor.warm_up()
    for layer in executor.kv_cache.layers:
        layer.normal_()
    torch.cuda.synchronize()
    say(f"ready, {torch.cuda.memory_allocated() / 1e9:.1f} GB of device memory in use")
    try:
        yield executor
    finally:
        del executor, weights
        gc.collect()
        torch.cuda.empty_cache()


def pages_needed(arguments: argparse.Namespace) -> int:
    decoding: int = max(arguments.batches) * (max(arguments.contexts) + SPARE_TOKENS + arguments.steps)
    offline = MAX_NUM_SEQS * (engine_figures.OFFLINE_INPUT + engine_figures.OFFLINE_OUTPUT + PAGE_SIZE)
    return max(decoding, offline, 4 * CHUNK_SIZE) // PAGE_SIZE + MAX_NUM_SEQS


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every figure could be taken."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    raw = named_config(arguments.model)
    config = ModelConfig.parse(raw)
    ceilings = measure_ceilings()
    machine = {"model": arguments.model, "gpu": gpu_name(), "state": gpu_state(), "ceilings": ceilings_line(ceilings),
               "tokens drawn": "greedily" if arguments.greedy else "at temperature 1", **describe_machine()}
    report = EngineReport(arguments.out, f"engine_{slug(arguments.model)}_{slug(gpu_name())}", machine)
    run = Run(arguments, report)
    run.say(f"{machine['state']}\n{machine['ceilings']}")
    num_pages = pages_needed(arguments)
    try:
        with torch.inference_mode(), running_executor(config, arguments, num_pages, run.say) as executor:
            prompts = Prompts(config, PAGE_SIZE, is_greedy=arguments.greedy)
            bench = Bench(executor=executor, config=config, ceilings=ceilings, prompts=prompts, num_pages=num_pages, page_size=PAGE_SIZE,
                          max_num_seqs=MAX_NUM_SEQS, steps=arguments.steps, chunk_size=CHUNK_SIZE)
            measure_all(run, bench, arguments)
            del bench, executor
    except Exception:
        run.num_failed += 1
        print(traceback.format_exc(), flush=True)
    if arguments.peers:
        measure_peers(run, raw)
    for path in report.write():
        run.say(f"wrote {path}")
    return 1 if run.num_failed else 0


def measure_peers(run: Run, raw: dict[str, Any]) -> None:
    from bench.gpu_peer import TransformersOnGpu

    try:
        peer = TransformersOnGpu(raw)
    except Exception:
        run.num_failed += 1
        print(traceback.format_exc(), flush=True)
        return
    run.take("transformers prefill", lambda: peer.prefill(8, 1024))
    for batch in (1, 64):
        run.take(f"transformers decode {batch}", lambda b=batch: peer.decode(b, 1024))  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
