"""The transports under one roof, for the contract suite: how a source is started, reached, stopped and killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from coordinator.messages import KVRank
from tests.workers.transfer.pools import PAGE_SIZE, WIDTH, layout_of, make_pool
from workers.kv_cache import KVCache
from workers.transfer.collective import CollectiveLink
from workers.transfer.mapped import MappedLink
from workers.transfer.moves import Link, Move
from workers.transfer.plan import plan

SILENCE_S = 2.0


class Source:
    """The ranks of a source, in a process of their own."""

    def __init__(self, kind: str, num_pages: int, tp_size: int = 1, device: str = "cpu", width: int = WIDTH) -> None:
        self.kind, self.num_pages, self.tp_size, self.width = kind, num_pages, tp_size, width
        program = Path(__file__).with_name("source_program.py")
        self.process = subprocess.Popen(
            [sys.executable, str(program), kind, str(num_pages), str(tp_size), device, str(width)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_ready(self) -> "Source":
        assert self.process.stdout is not None
        self.ranks = [KVRank(**rank) for rank in json.loads(self.process.stdout.readline())]
        return self

    def fill(self, salt: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{salt}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "filled\n"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Loopback:
    """The double: a pool of this process, copied by plain assignment."""

    def __init__(self, pool: KVCache, source: KVCache) -> None:
        self._pool = pool
        self._source = source

    def copy(self, move: Move) -> None:
        src, dst = (pool.flat.unflatten(1, (-1, PAGE_SIZE)) for pool in (self._source, self._pool))
        heads = move.heads
        dst[:, list(move.dst_pages), :, self._pool.columns(heads.target, heads.num_heads)] = \
            src[:, list(move.src_pages), :, self._source.columns(heads.source, heads.num_heads)]

    def close(self) -> None:
        pass


def open_link(family: str, pool: KVCache, source: Source, rank: int = 0) -> Link:
    stream = torch.cuda.Stream() if pool.device.type == "cuda" else None
    if family == "loopback":
        return Loopback(pool, make_pool(source.kind, source.num_pages, source.tp_size, rank))
    if family == "mapped":
        return MappedLink(pool, source.ranks[rank].address, source.num_pages, layout_of(source.kind, source.tp_size, source.width), stream)
    return CollectiveLink(pool, source.ranks[rank].desk, stream, SILENCE_S)


def fetch(links: list[Link], pool: KVCache, src_pages: list[int], dst_pages: list[int], num_tokens: int, rank: int = 0) -> None:
    """A hand-over as the copier makes it: every part of the plan over the link of its source rank."""
    layout = pool.layout("")
    for part in plan(layout.num_kv_heads, len(links), layout.tp_size, rank):
        move = Move.of(part, src_pages, dst_pages, num_tokens, PAGE_SIZE)
        if move.num_tokens:
            links[part.source_rank].copy(move)
