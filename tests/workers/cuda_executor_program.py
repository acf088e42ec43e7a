"""Run steps of every kind on the executor for GPUs, interpreted on the CPU, and on the plain model; fail where they differ.

A chunk of a prompt, the rest of it beside a decode, decodes that carry their token over from the step before, scattered pages
whose other slots hold NaN, a batch whose rows change places, and a prompt of which a single token runs between decodes.
"""

import sys
import tempfile
from pathlib import Path

import torch

from coordinator.sampling import SamplingParams
from kernels.cuda import CUDA
from workers.batch import ForwardBatch
from workers.cuda_executor import CudaExecutor
from workers.loader import Checkpoint
from workers.model_config import ModelConfig
from workers.model_runner import ModelRunner
from workers.random_model import Overrides, write_random_model
from workers.sequence import Sequence

PAGE_SIZE, NUM_PAGES = 16, 24
CPU = torch.device("cpu")


class Walk:
    """Two executions of the same sequences; the plain one always knows every token."""

    def __init__(self, path: Path) -> None:
        config = ModelConfig.from_dir(path)
        self.plain = ModelRunner(path, "cpu", torch.float32, NUM_PAGES, PAGE_SIZE)
        self.fused = CudaExecutor(config, Checkpoint(path, config, torch.float32, CPU), device=CPU, dtype=torch.float32,
                                  num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_num_seqs=4, max_seq_len=128, chunk_size=64,
                                  use_cuda_graphs=False, ops=CUDA)
        for cache in self.fused.kv_cache.layers:
            cache.fill_(float("nan"))
        self.vocab_size = config.vocab_size

    def step(self, work: list[tuple[Sequence, int]], last: list[Sequence]) -> list[Sequence]:
        """Run `count` more tokens of each sequence; `last` are those sampled in the step before. Returns those sampled now."""
        batch = ForwardBatch(token_ids=[], positions=[], slot_mapping=[], query_lens=[], seq_lens=[], page_tables=[], logit_rows=[],
                             carried=[])
        known: list[int] = []
        sampled = []
        for sequence, count in work:
            start, end = sequence.num_computed, sequence.num_computed + count
            carried = last.index(sequence) if sequence in last else -1
            known += sequence.token_ids[start:end]
            batch.token_ids += sequence.token_ids[start:end] if carried < 0 else [0]
            batch.positions += range(start, end)
            batch.slot_mapping += [sequence.page_table[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
            batch.query_lens.append(count)
            batch.seq_lens.append(end)
            batch.page_tables.append(sequence.page_table)
            batch.carried.append(carried)
            sequence.num_computed = end
            if end == len(sequence.token_ids):
                batch.logit_rows.append(len(batch.token_ids) - 1)
                sampled.append(sequence)
        ids, logprobs = self.fused.launch(batch, sampled).result()
        batch.token_ids = known
        logits = self.plain.forward(batch)
        expected = logits.log_softmax(-1)
        for row, sequence in enumerate(sampled):
            assert ids[row] == int(logits[row].argmax()), f"row {row}: token {ids[row]}, expected {int(logits[row].argmax())}"
            assert abs(logprobs[row] - float(expected[row, ids[row]])) < 2e-3, (logprobs[row], float(expected[row, ids[row]]))
            sequence.token_ids.append(ids[row])
        return sampled


def sequence(walk: Walk, length: int, pages: list[int], seed: int) -> Sequence:
    ids = torch.randint(0, walk.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sequence(job_id=f"job {seed}", token_ids=ids, num_prompt=length, params=SamplingParams(max_new_tokens=50, do_sample=False),
                    max_kv_tokens=100, page_table=pages)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder), sys.argv[1], Overrides(layers=2), seed=3)
        walk = Walk(path)
        a = sequence(walk, 21, [7, 2], 1)
        b = sequence(walk, 37, [4, 11, 3], 2)
        c = sequence(walk, 5, [0], 3)
        last = walk.step([(a, 21)], [])
        last = walk.step([(a, 1), (b, 17)], last)
        last = walk.step([(a, 1), (b, 20), (c, 5)], last)
        last = walk.step([(c, 1), (b, 1), (a, 1)], last)
        d = sequence(walk, 3, [5], 4)
        last = walk.step([(a, 1), (d, 1), (c, 1)], last)  # a prompt goes on by one token, and draws none
        for _ in range(9):  # a grows past the end of its second page
            if a.num_computed == 32:
                a.page_table.append(9)
            last = walk.step([(b, 1), (a, 1), (c, 1)], last)


main()
