"""Model execution alone, without scheduler, sampler or queue: decode and prefill speed beside transformers, in one run.

    python -m bench.model_forward                      random weights in the demo model's shape
    python -m bench.model_forward --model_dir DIR      a checkpoint

The machine may be shared: the two engines take turns and the best round of each counts; trust the ratios. Where it is very
busy, `--cpu_time` with OMP_NUM_THREADS=1 counts the CPU time of the one thread instead of the time on the wall.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workers.batch import ForwardBatch
from workers.model_runner import ModelRunner
from workers.random_model import Overrides, write_random_model

DEMO_SHAPE = Overrides(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=49152, max_position=8192, tied=True)
PAGE_SIZE = 16

Clock = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path)
    parser.add_argument("--checkpoint_dtype", default="float16", help="of the random weights")
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU time of one thread")
    parser.add_argument("--skip_peer", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    clock = time.thread_time if args.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        model_dir = args.model_dir or write_random_model(Path(folder), "llama", DEMO_SHAPE, dtype=args.checkpoint_dtype)
        dtype = getattr(torch, args.dtype)
        pages_each = -(-(max(args.context + 64, args.prefill) + 1) // PAGE_SIZE)
        runner = ModelRunner(model_dir, "cpu", dtype, pages_each * max(args.batch_sizes), PAGE_SIZE, 2)
        runner.warmup()
        peer = None if args.skip_peer else _load_peer(model_dir, dtype)
    print(f"{torch.get_num_threads()} threads, {args.dtype}, context {args.context}")
    best: dict[str, float] = {}
    for _ in range(args.rounds):
        for size in args.batch_sizes:
            _keep_best(best, f"ours, decode of {size}", size / _decode_step_s(clock, runner, size, args.context, pages_each))
        _keep_best(best, f"ours, prefill of {args.prefill}", args.prefill / _prefill_s(clock, runner, args.prefill))
        if peer is not None:
            _keep_best(best, "transformers.generate, decode of 1", 1 / _peer_step_s(clock, peer, args.context))
            _keep_best(best, f"transformers, prefill of {args.prefill}", args.prefill / _peer_prefill_s(clock, peer, args.prefill))
    for name, speed in best.items():
        print(f"{name:40} {speed:9.1f} tok/s")
    single = best[f"ours, decode of {args.batch_sizes[0]}"]
    print(f"batch {args.batch_sizes[-1]} / {args.batch_sizes[0]}: {best[f'ours, decode of {args.batch_sizes[-1]}'] / single:.2f}x")
    if peer is not None:
        print(f"single stream / transformers: {single / best['transformers.generate, decode of 1']:.2f}x")
        print(f"prefill / transformers: {best[f'ours, prefill of {args.prefill}'] / best[f'transformers, prefill of {args.prefill}']:.2f}x")


def _keep_best(best: dict[str, float], name: str, speed: float) -> None:
    best[name] = max(speed, best.get(name, 0.0))


def _median_s(clock: Clock, step: Callable[[int], object], count: int) -> float:
    seconds = []
    for i in range(count):
        start = clock()
        step(i)
        seconds.append(clock() - start)
    return sorted(seconds)[count // 2]


def _tokens(count: int, vocab_size: int) -> list[int]:
    return torch.randint(vocab_size, (count,)).tolist()


def _decode_step_s(clock: Clock, runner: ModelRunner, size: int, context: int, pages_each: int) -> float:
    tables = [list(range(i * pages_each, (i + 1) * pages_each)) for i in range(size)]

    def step(i: int) -> None:
        position = context + i
        slots = [table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for table in tables]
        logits = runner.forward(ForwardBatch(_tokens(size, runner.config.vocab_size), [position] * size, slots, [1] * size,
                                             [position + 1] * size, tables, list(range(size))))
        logits.argmax(-1).tolist()

    step(0)
    return _median_s(clock, step, 40)


def _prefill_s(clock: Clock, runner: ModelRunner, length: int) -> float:
    pages = list(range(-(-length // PAGE_SIZE)))

    def step(_: int) -> None:
        runner.forward(ForwardBatch(_tokens(length, runner.config.vocab_size), list(range(length)), list(range(length)), [length], [length],
                                    [pages], [length - 1]))

    step(0)
    return _median_s(clock, step, 3)


def _load_peer(model_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM  # only the comparison needs it
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()


def _peer_step_s(clock: Clock, peer: Any, context: int) -> float:
    prompt = torch.tensor([_tokens(context, peer.config.vocab_size)])

    def generate(new_tokens: int) -> float:
        start = clock()
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
        return clock() - start

    return (generate(41) - generate(1)) / 40


def _peer_prefill_s(clock: Clock, peer: Any, length: int) -> float:
    def step(_: int) -> None:
        with torch.inference_mode():
            peer(torch.tensor([_tokens(length, peer.config.vocab_size)]), logits_to_keep=1)

    step(0)
    return _median_s(clock, step, 3)


if __name__ == "__main__":
    main()
