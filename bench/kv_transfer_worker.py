"""The taking side of bench/kv_transfer.py, in a process of its own: every way of transfer between one pair of devices, one after the other.

Prints a line of JSON per figure as soon as it has it; what fails costs its own figure.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import torch

from bench.engine_loop import EngineLoop, Prompts
from bench.kv_transfer_source import PAGE_SIZE, fill_with_noise, make_pool
from coordinator.messages import KVRank
from workers.kv_cache import HeadRun, KVCache
from workers.transfer.collective import CollectiveLink
from workers.transfer.mapped import MappedLink
from workers.transfer.moves import Link, Move
from workers.transfer.nccl_wire import NcclWire

ROUNDS = 12
MIN_S = 0.3
DEVICE_CALLS, HEAD_START_CYCLES = 8, 20_000_000   # 10 ms
LATENT = HeadRun(0, 0, 1)
BATCH, CONTEXT, STEPS = 64, 1024, 80     # of the decode that transfers run beside
BUSY_TOKENS = 4096                       # of each handle that moves meanwhile
PREFILL_TOK_S = 110_000                  # what one GPU prefills: more cannot come for long


def say(kind: str, **values: Any) -> None:
    print(json.dumps({"kind": kind, **values}), flush=True)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_transfer_worker", allow_abbrev=False)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--source_device", default="cuda:0")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--decode", action="store_true", help="also measure how much transfers slow decode steps down")
    return parser.parse_args(argv)


@contextlib.contextmanager
def running_source(device: str, num_pages: int) -> Iterator[KVRank]:
    command = [sys.executable, "-m", "bench.kv_transfer_source", "--device", device, "--num_pages", str(num_pages)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the source ended with status {process.wait()}")
        yield KVRank(**json.loads(line))
    finally:
        process.stdin.close()
        process.wait(30)


def timed_s(call: Callable[[], object]) -> float:
    """Median of some rounds, after two that warm up."""
    times: list[float] = []
    ends_at = time.perf_counter() + MIN_S
    while len(times) < ROUNDS + 2 or time.perf_counter() < ends_at:
        started_at = time.perf_counter()
        call()
        times.append(time.perf_counter() - started_at)
    return median(times[2:])


def device_s(call: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """What one of several calls in a row takes on the device alone: the host is done before the first begins."""
    with torch.cuda.stream(stream):
        call()
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        started.record()
        for _ in range(DEVICE_CALLS):
            call()
        ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / DEVICE_CALLS / 1e3


def plain_copy_s(num_bytes: int, device: torch.device, source: torch.device) -> tuple[float, float]:
    """What a copy of as many contiguous bytes takes, by the clock and on the device: nothing that gathers pages can be faster."""
    src, dst = (torch.empty(num_bytes, dtype=torch.uint8, device=where) for where in (source, device))
    src.fill_(1)

    def copy() -> None:
        dst.copy_(src, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = timed_s(copy)
    if device.type == "cpu":
        return seconds, seconds
    return seconds, device_s(lambda: dst.copy_(src, non_blocking=True), torch.cuda.Stream(device))


class Pair:
    """Our pool, the source's addresses, and the ways between the two."""

    def __init__(self, pool: KVCache, rank: KVRank, num_pages: int) -> None:
        self.pool = pool
        self.rank = rank
        self.num_pages = num_pages
        self.stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

    def links(self) -> dict[str, Callable[[], Link]]:
        return {"mapped": lambda: MappedLink(self.pool, self.rank.address, self.num_pages, self.pool.layout(""), self.stream),
                "collective": lambda: CollectiveLink(self.pool, self.rank.desk, self.stream)}

    def move(self, num_tokens: int, first: int = 0) -> Move:
        """Scattered pages on both sides, as after some hours of serving."""
        count = num_tokens // PAGE_SIZE
        draw = torch.Generator().manual_seed(num_tokens)
        src, dst = (torch.randperm(self.num_pages, generator=draw)[:count].tolist() for _ in range(2))
        return Move(src_pages=src, dst_pages=[first + page for page in dst], num_tokens=num_tokens, heads=LATENT)

    def is_right(self, move: Move, source: KVCache) -> bool:
        size = PAGE_SIZE
        theirs, ours = source.flat.unflatten(1, (-1, size)), self.pool.flat.unflatten(1, (-1, size))
        return torch.equal(theirs[:, list(move.src_pages)].to(ours.device), ours[:, list(move.dst_pages)])


def measure_pair(arguments: argparse.Namespace) -> None:
    device, source_device = torch.device(arguments.device), torch.device(arguments.source_device)
    num_pages = max(arguments.tokens) // PAGE_SIZE + 8
    twin = make_pool(source_device, num_pages)  # as the source's: what has to arrive
    fill_with_noise(twin)
    pool = make_pool(device, num_pages)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.synchronize(source_device)
    plain = {tokens: plain_copy_s(tokens * pool.bytes_per_token, device, source_device) for tokens in arguments.tokens}
    with running_source(arguments.source_device, num_pages) as rank:
        pair = Pair(pool, rank, num_pages)
        for family, open_link in pair.links().items():
            try:
                measure_link(pair, family, open_link, plain, twin)
            except Exception as error:
                say("failed", what=family, why=f"{type(error).__name__}: {error}")
                traceback.print_exc()


def measure_link(pair: Pair, family: str, open_link: Callable[[], Link], plain: dict[int, tuple[float, float]], twin: KVCache) -> None:
    started_at = time.perf_counter()
    link = open_link()
    try:
        link.copy(pair.move(min(plain)))
        opened_s = time.perf_counter() - started_at
        name = family if isinstance(link, MappedLink) else wire_name(link)
        for tokens, (plain_s, plain_device_s) in plain.items():
            move = pair.move(tokens)
            seconds = timed_s(lambda move=move: link.copy(move))  # type: ignore[misc]
            num_bytes = tokens * pair.pool.bytes_per_token
            on_device = {}
            if isinstance(link, MappedLink) and pair.stream is not None:
                source = KVCache.attach(pair.rank.address, pair.num_pages, pair.pool.layout(""))
                moving_s = device_s(lambda move=move, source=source: pair.pool.copy_pages_from(  # type: ignore[misc]
                    source, move.src_pages, move.dst_pages, move.num_tokens), pair.stream)
                on_device = {"device_ms": moving_s * 1e3, "device_gb_s": num_bytes / moving_s / 1e9,
                             "device_plain_gb_s": num_bytes / plain_device_s / 1e9, "device_share": plain_device_s / moving_s}
            say("transfer", way=name, tokens=tokens, bytes=num_bytes, ms=seconds * 1e3, gb_s=num_bytes / seconds / 1e9,
                plain_gb_s=num_bytes / plain_s / 1e9, share=plain_s / seconds, right=pair.is_right(move, twin),
                opened_ms=opened_s * 1e3, **on_device)
    finally:
        link.close()


def wire_name(link: Link) -> str:
    wire = getattr(link, "_wire", None)
    return "nccl" if isinstance(wire, NcclWire) else "gloo"


def measure_decode(arguments: argparse.Namespace) -> None:
    """Decode steps of the real engine with V2-Lite's shape: alone, beside handles at the pace of a prefill worker, and back to back."""
    from bench.device_weights import RandomWeights
    from bench.shapes import named_config
    from workers.cuda_executor import CudaExecutor
    from workers.model_config import ModelConfig
    from workers.step import SchedulerSettings

    device = torch.device(arguments.device)
    torch.cuda.set_device(device)
    config = ModelConfig.parse(named_config("v2-lite"))
    spare = BUSY_TOKENS // PAGE_SIZE + 8
    num_pages = BATCH * ((CONTEXT + 16 * STEPS) // PAGE_SIZE + 2)
    with torch.inference_mode():
        executor = CudaExecutor(config, RandomWeights(config, torch.bfloat16, device), device=device, dtype=torch.bfloat16,
                                num_pages=num_pages + spare, page_size=PAGE_SIZE, max_num_seqs=BATCH, chunk_size=2048,
                                graph_max_batch_size=BATCH)
        executor.warm_up()
        settings = SchedulerSettings(num_pages=num_pages, page_size=PAGE_SIZE, chunk_size=2048, max_batch_tokens=BATCH + 1,
                                     max_num_seqs=BATCH, prefix_cache=False, depth=executor.depth)
        loop = EngineLoop(executor, settings)
        loop.add(Prompts(config, PAGE_SIZE).imported(BATCH, CONTEXT, 16 * STEPS))
        loop.admit_imported()
        loop.run(STEPS)
        with running_source(arguments.source_device, spare) as rank:
            pair = Pair(executor.kv_cache, rank, spare)
            move = pair.move(BUSY_TOKENS, first=num_pages)
            for family, open_link in pair.links().items():
                link = open_link()
                try:
                    link.copy(move)
                    name = family if isinstance(link, MappedLink) else wire_name(link)
                    for pace, tok_s in (("at the pace of a prefill GPU", PREFILL_TOK_S), ("back to back", 0)):
                        before = steps_ms(loop)
                        with copying(link, move, tok_s) as count:
                            beside = steps_ms(loop)
                        alone = (before + steps_ms(loop)) / 2  # contexts grow meanwhile
                        say("decode", way=name, pace=pace, alone_ms=alone, beside_ms=beside, more=beside / alone - 1, copies=len(count))
                except Exception as error:
                    say("failed", what=f"decode beside {family}", why=f"{type(error).__name__}: {error}")
                finally:
                    link.close()


def steps_ms(loop: EngineLoop) -> float:
    """Mean of some decode steps, behind a few that are not counted."""
    before = loop.run(4)[-1].at_s
    return (loop.run(STEPS)[-1].at_s - before) / STEPS * 1e3


@contextlib.contextmanager
def copying(link: Link, move: Move, tok_s: float) -> Iterator[list[float]]:
    """Copies from a thread of their own, as in a worker; at `tok_s` tokens a second, 0: without a pause."""
    done: list[float] = []
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(max(0.0, move.num_tokens / tok_s - done[-1]) if tok_s and done else 0.0):
            started_at = time.perf_counter()
            link.copy(move)
            done.append(time.perf_counter() - started_at)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        is_over.set()
        thread.join(60)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    if arguments.device != "cpu":
        torch.cuda.set_device(torch.device(arguments.device))
    for section in (measure_pair, *([measure_decode] if arguments.decode else [])):
        try:
            section(arguments)
        except Exception as error:
            say("failed", what=section.__name__.removeprefix("measure_"), why=f"{type(error).__name__}: {error}"[:300])
            traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main())
