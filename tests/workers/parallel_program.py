"""One rank of several: runs the cases of a JSON file on its part of each model and writes what it computed.

    python tests/workers/parallel_program.py FOLDER RANK RANKS

The folder holds cases.json; rank r writes result-r.json (case -> tokens of each of its sequences, experts moved) and CASE-r.pt (logits
of a prompt).
"""

import json
import random
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.batch import Agreed, ForwardBatch
from workers.model import spread_moe
from workers.model_runner import ModelRunner
from workers.parallel import Parallel, ParallelSizes

PAGE_SIZE, PAGES_EACH, NUM_STEPS, NEW_TOKENS, CHUNK = 8, 8, 15, 6, 9
LENGTHS = {0: (1, 19, 30), 1: (23, 4), 2: (), 3: (9,)}  # prompts by dp group: one group never has work


@dataclass
class Seq:
    token_ids: list[int]
    pages: list[int]
    num_prompt: int = 0
    num_computed: int = 0
    starts_at: int = 0
    output: list[int] = field(default_factory=list)


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(2, 512), k=length)


def prompts_of(dp_rank: int) -> list[list[int]]:
    return [prompt(length, dp_rank) for length in LENGTHS[dp_rank]]


def make_batch(seqs: list[Seq]) -> tuple[ForwardBatch, list[Seq]]:
    """The next chunk or decode of every sequence."""
    batch, sampled = ForwardBatch([], [], [], [], [], [], []), []
    for seq in seqs:
        start, end = seq.num_computed, min(seq.num_computed + CHUNK, len(seq.token_ids))
        batch.token_ids += seq.token_ids[start:end]
        batch.positions += range(start, end)
        batch.slot_mapping += [seq.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
        batch.query_lens.append(end - start)
        batch.seq_lens.append(end)
        batch.page_tables.append(seq.pages)
        seq.num_computed = end
        if end == len(seq.token_ids):
            batch.logit_rows.append(len(batch.token_ids) - 1)
            sampled.append(seq)
    return batch, sampled


def serve(runner: ModelRunner, dp_rank: int, agree: Any) -> list[list[int]]:
    """Greedy tokens of the group's prompts, which arrive one after the other; steps without work are run empty."""
    seqs = []
    for i, token_ids in enumerate(prompts_of(dp_rank)):
        pages = list(range(1 + i * PAGES_EACH, 1 + (i + 1) * PAGES_EACH))
        random.Random(i).shuffle(pages)
        seqs.append(Seq(list(token_ids), pages, starts_at=3 * i))
    if len(seqs) > 2:  # a prefix hit: its first pages are those that another sequence has filled
        shared = 2 * PAGE_SIZE
        seqs[2].token_ids[:shared], seqs[2].pages[:2], seqs[2].num_computed = seqs[1].token_ids[:shared], seqs[1].pages[:2], shared
    for step in range(NUM_STEPS):
        running = [seq for seq in seqs if seq.starts_at <= step and len(seq.output) < NEW_TOKENS]
        batch, sampled = make_batch(running)
        agree(batch)
        logits = runner.forward(batch)
        for seq, token in zip(sampled, logits.argmax(-1).tolist(), strict=True):
            seq.token_ids.append(token)
            seq.output.append(token)
    return [seq.output for seq in seqs]


def whole_prompt(length: int) -> ForwardBatch:
    rows = list(range(length))
    return ForwardBatch(prompt(length, 9), rows, rows, [length], [length], [list(range(PAGES_EACH))], rows)


def no_agreement(batch: ForwardBatch) -> None:
    pass


def agreement(group: dist.ProcessGroup) -> Any:
    """What the farm's lockstep tells: the most rows of any group, and whether all have decodes only."""

    def agree(batch: ForwardBatch) -> None:
        own = torch.tensor([len(batch.token_ids), int(any(count > 1 for count in batch.query_lens))])
        dist.all_reduce(own, op=dist.ReduceOp.MAX, group=group)
        num_rows, has_chunks = own.tolist()
        batch.agreed = Agreed(num_rows, not has_chunks)

    return agree


def run_case(case: dict[str, Any], groups: dict[int, dist.ProcessGroup], folder: Path) -> dict[str, Any]:
    sizes = ParallelSizes(**case["sizes"])
    parallel = Parallel.join(sizes, groups[sizes.tp])
    runner = ModelRunner(Path(case["model"]), "cpu", torch.float32, 40, PAGE_SIZE, load_workers=2, parallel=parallel)
    agree = agreement(groups[sizes.tp]) if case.get("agrees") else no_agreement
    runner.warmup()
    batch = whole_prompt(21)
    agree(batch)
    logits = runner.forward(batch)
    torch.save(logits, folder / f"{case['name']}-{dist.get_rank()}.pt")
    tokens = serve(runner, sizes.dp_rank(parallel.rank), agree)
    return {"tokens": tokens, "num_moved": runner.balancer.num_moved}


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    spread_moe.MAX_ROWS = 16
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    groups = {size: dist.group.WORLD, 2: pairs[rank // 2]}
    cases = json.loads((folder / "cases.json").read_text())
    results = {case["name"]: run_case(case, groups, folder) for case in cases}
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
