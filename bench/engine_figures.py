"""How the engine's figures are taken: decode steps, prefill chunks, the first token of one prompt, and a batch of requests offline."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.engine_loop import EngineLoop, Executor, Prompts
from bench.roofline import Ceilings, Work, experts_visited, launch_gaps_s, step_floor_s
from workers.model_config import ModelConfig
from workers.step import SchedulerSettings

WARM_TURNS = 8
PROMPT = 1024               # tokens of a prefilled prompt
LATENCY_ROUNDS = 8
OFFLINE_INPUT, OFFLINE_OUTPUT = 1000, 100
UNBELIEVABLE = 1.02         # times better than the floor: something was not computed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigure:
    """`step_ms` by the wall clock over the whole loop, `gpu_ms` from launch to end on the device, both medians; rates are of tokens.

    experts  distinct routed experts that a layer visited, counted on the device; None: not counted, the floor takes them as uniform
    """

    kind: str                       # "decode", "prefill", "latency", "offline", or a peer's
    name: str
    batch: int
    context: int
    step_ms: float
    tok_s: float
    floor_ms: float | None = None
    launch_floor_ms: float | None = None   # with the gaps between the kernels
    gpu_ms: float | None = None
    experts: float | None = None
    note: str = ""

    @property
    def share(self) -> float | None:
        """Of the roofline with launch gaps where there is one, 1 at best."""
        floor = self.launch_floor_ms or self.floor_ms
        return floor / self.step_ms if floor else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def line(self) -> str:
        parts = [f"{self.kind} {self.name}: {self.step_ms:.3f} ms, {self.tok_s:,.0f} tok/s"]
        if self.gpu_ms is not None:
            parts.append(f"on the GPU {self.gpu_ms:.3f} ms")
        if self.floor_ms is not None:
            parts.append(f"floor {self.floor_ms:.3f}")
        if self.launch_floor_ms is not None:
            parts.append(f"with gaps {self.launch_floor_ms:.3f}")
        if self.share is not None:
            parts.append(f"{self.share:.0%} of it")
        if self.experts is not None:
            parts.append(f"{self.experts:.1f} experts")
        return ", ".join([*parts, self.note] if self.note else parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all measurements share."""

    executor: Executor
    config: ModelConfig
    ceilings: Ceilings
    prompts: Prompts
    num_pages: int
    page_size: int
    max_num_seqs: int
    steps: int
    chunk_size: int

    def loop(self, *, max_num_seqs: int, max_batch_tokens: int, watch: "GpuWatch | None" = None) -> EngineLoop:
        settings = SchedulerSettings(num_pages=self.num_pages, page_size=self.page_size, chunk_size=self.chunk_size,
                                     max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, prefix_cache=False,
                                     depth=self.executor.depth)
        return EngineLoop(self.executor, settings, watch.mark if watch else lambda: None)


class GpuWatch:
    """Events around every launch, on the executor's stream: what the device was busy with a step."""

    def __init__(self, executor: Executor) -> None:
        self._stream = getattr(executor, "stream", None)
        self._marks: list[torch.cuda.Event] = []
        self._is_on = torch.cuda.is_available()

    def mark(self) -> None:
        if self._is_on:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream or torch.cuda.current_stream())
            self._marks.append(event)

    def steps_ms(self, num_last: int) -> list[float]:
        if not self._marks:
            return []
        torch.cuda.synchronize()
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=False))
        return [before.elapsed_time(after) for before, after in pairs[-num_last:]]


def decode(bench: Bench, batch: int, context: int) -> EngineFigure:
    """Steady decode: sequences come with `context` tokens of keys and values, which are noise, and stay to the end."""
    watch = GpuWatch(bench.executor)
    loop = bench.loop(max_num_seqs=batch, max_batch_tokens=batch + 1, watch=watch)
    loop.add(bench.prompts.imported(batch, context, WARM_TURNS + bench.steps + 4 * bench.executor.depth + 8))
    loop.admit_imported()
    last = loop.run(WARM_TURNS)[-1]
    turns = [last, *loop.run(bench.steps)]
    assert all(turn.num_drawn == batch for turn in turns), "the batch was not whole in every step"
    step_s = median(after.at_s - before.at_s for before, after in pairwise(turns))
    experts = _counted_experts(bench.executor)
    middle = context + WARM_TURNS + bench.steps // 2
    floor_s = step_floor_s(bench.config, Work.decode(batch, middle, experts), bench.ceilings)
    gaps_s = launch_gaps_s(bench.config, bench.ceilings)
    gpu_ms = watch.steps_ms(bench.steps)
    note = "BETTER THAN THE FLOOR: not believable" if step_s * UNBELIEVABLE < floor_s else ""
    if experts is None and bench.config.moe is not None:
        note = note or f"experts not counted, {experts_visited(bench.config.moe, batch):.1f} assumed"
    return EngineFigure(
        kind="decode", name=f"batch {batch}, context {context}", batch=batch, context=context, step_ms=step_s * 1e3, tok_s=batch / step_s,
        floor_ms=floor_s * 1e3, launch_floor_ms=(floor_s + gaps_s) * 1e3, gpu_ms=median(gpu_ms) if gpu_ms else None, experts=experts,
        note=note)


def prefill(bench: Bench, chunk: int, *, num_chunks: int = 12) -> EngineFigure:
    """Steps full of prompts of 1,024 tokens each, which end with their first token."""
    prompt = min(PROMPT, chunk)
    watch = GpuWatch(bench.executor)
    loop = bench.loop(max_num_seqs=min(bench.max_num_seqs, max(1, chunk // 2)), max_batch_tokens=chunk, watch=watch)
    loop.add(bench.prompts.fresh(num_chunks * chunk // prompt, prompt, 1))
    turns = loop.run_to_the_end()[1:]
    full = [after.at_s - before.at_s for before, after in pairwise(turns) if after.num_tokens == chunk]
    step_s = median(full)
    floor_s = step_floor_s(bench.config, Work.prefill(chunk, prompt), bench.ceilings)
    gpu_ms = watch.steps_ms(len(full))
    return EngineFigure(
        kind="prefill", name=f"chunk {chunk} of {prompt}-token prompts", batch=chunk // prompt, context=prompt, step_ms=step_s * 1e3,
        tok_s=chunk / step_s, floor_ms=floor_s * 1e3, gpu_ms=median(gpu_ms) if gpu_ms else None)


def latency(bench: Bench) -> EngineFigure:
    """One prompt of 1,024 tokens on an idle engine, until its first token is on the host."""
    times = []
    for _ in range(LATENCY_ROUNDS + 2):
        loop = bench.loop(max_num_seqs=1, max_batch_tokens=bench.chunk_size + 1)
        loop.add(bench.prompts.fresh(1, PROMPT, 1))
        started = perf_counter()
        loop.run_to_the_end()
        times.append(perf_counter() - started)
    step_s = median(times[2:])
    floor_s = step_floor_s(bench.config, Work.prefill(PROMPT, PROMPT), bench.ceilings)
    return EngineFigure(kind="latency", name=f"first token of {PROMPT} alone", batch=1, context=PROMPT, step_ms=step_s * 1e3,
                        tok_s=PROMPT / step_s, floor_ms=floor_s * 1e3)


def offline(bench: Bench, num_requests: int) -> EngineFigure:
    """All requests at once, 1,000 tokens in and 100 out; the rate is of requests' output tokens, the note has requests per second."""
    loop = bench.loop(max_num_seqs=bench.max_num_seqs, max_batch_tokens=bench.chunk_size + bench.max_num_seqs)
    requests = bench.prompts.fresh(num_requests, OFFLINE_INPUT, OFFLINE_OUTPUT)
    started = perf_counter()
    loop.add(requests)
    turns = loop.run_to_the_end()
    elapsed_s = perf_counter() - started
    drawn = sum(turn.num_drawn for turn in turns)
    assert drawn == num_requests * OFFLINE_OUTPUT, f"{drawn} tokens came back, {num_requests * OFFLINE_OUTPUT} were asked for"
    what = f"{num_requests} x {OFFLINE_INPUT}/{OFFLINE_OUTPUT}"
    note = f"{num_requests / elapsed_s:.1f} req/s, {elapsed_s:.2f} s in {len(turns)} steps"
    return EngineFigure(kind="offline", name=what, batch=bench.max_num_seqs, context=OFFLINE_INPUT, step_ms=elapsed_s * 1e3,
                        tok_s=drawn / elapsed_s, note=note)


def _counted_experts(executor: Executor) -> float | None:
    """Mean over the layers, of the last step; None where the executor has no counter."""
    count: Callable[[], float] | None = getattr(executor, "count_experts", None)
    return float(count()) if count is not None else None
