"""One rank per GPU over NCCL: logits of prompts and of decodes in CUDA graphs, against the same executor on one GPU.

    python tests/workers/parallel_gpu_program.py FOLDER RANK RANKS

The folder holds cases.json: [{name, model, sizes}]. Fails where logits are further from those of one rank than roundings explain; rank 0
prints a row per case: the distance, and the times of a step of decodes and of one with prompts on one rank and on all.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.batch import Agreed, ForwardBatch
from workers.cuda_executor import CudaExecutor
from workers.loader import Checkpoint
from workers.model_config import ModelConfig
from workers.parallel import ONE, Parallel, ParallelSizes, without_multicast

PAGE_SIZE, NUM_DECODES, NUM_TIMED = 64, 12, 50
LENGTHS = (130, 64, 7)
MOST_DISTANCE = 0.05  # bfloat16 sums in another order, and a router's near ties


def build(path: Path, device: torch.device, parallel: Parallel) -> CudaExecutor:
    config = ModelConfig.from_dir(path)
    executor = CudaExecutor(config, Checkpoint(path, config, torch.bfloat16, device), device=device, dtype=torch.bfloat16, num_pages=40,
                            page_size=PAGE_SIZE, max_num_seqs=8, max_seq_len=1024, chunk_size=2048, parallel=parallel)
    executor.warm_up()
    return executor


def batch_of(sequences: list[list[int]], spans: list[tuple[int, int]], agreed: Agreed) -> ForwardBatch:
    batch = ForwardBatch(token_ids=[], positions=[], slot_mapping=[], query_lens=[], seq_lens=[], page_tables=[], logit_rows=[], carried=[],
                         agreed=agreed)
    for i, (ids, (start, end)) in enumerate(zip(sequences, spans, strict=True)):
        batch.token_ids += ids[start:end]
        batch.query_lens.append(end - start)
        batch.seq_lens.append(end)
        batch.page_tables.append(list(range(4 * i, 4 * i + 4)))
        batch.carried.append(-1)
        batch.logit_rows.append(len(batch.token_ids) - 1)
    return batch


def logits(executor: CudaExecutor, sequences: list[list[int]]) -> Tensor:
    """[1 + NUM_DECODES, sequences, vocab]: tokens are given, not drawn. Without sequences: the same steps, empty."""
    lengths = LENGTHS[: len(sequences)]
    rows = []
    for step in range(1 + NUM_DECODES):
        spans = [(0, length) if step == 0 else (length + step - 1, length + step) for length in lengths]
        agreed = Agreed(sum(LENGTHS), is_decode=False) if step == 0 else Agreed(len(LENGTHS), is_decode=True)
        with torch.inference_mode():
            rows.append(executor._forward(batch_of(sequences, spans, agreed))[: len(sequences)].clone())
            executor.balancer.after_step()
    torch.cuda.synchronize()
    return torch.stack(rows)


def timed_ms(executor: CudaExecutor, batch: ForwardBatch) -> float:
    """All dp groups run the same batch."""
    took = 0.0
    for _ in range(2):  # the first time warms up
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(NUM_TIMED):
                executor._forward(batch)
        torch.cuda.synchronize()
        took = (time.perf_counter() - start) / NUM_TIMED * 1e3
    return took


def times(executor: CudaExecutor, sequences: list[list[int]]) -> dict[str, float]:
    decodes = batch_of(sequences, [(length, length + 1) for length in LENGTHS], Agreed(len(LENGTHS), is_decode=True))
    prompt = batch_of(sequences[:1] * 8, [(0, LENGTHS[0])] * 8, Agreed(8 * LENGTHS[0], is_decode=False))
    return {"decode": timed_ms(executor, decodes), "prefill": timed_ms(executor, prompt)}


def run_case(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    path, sizes = Path(case["model"]), ParallelSizes(**case["sizes"])
    vocab = ModelConfig.from_dir(path).vocab_size
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, vocab, (length + NUM_DECODES + 1,), generator=generator).tolist() for length in LENGTHS]
    one = build(path, device, ONE)
    wanted, alone = logits(one, sequences), times(one, sequences)
    del one
    torch.cuda.empty_cache()
    parallel = Parallel.join(sizes)
    mine = sequences if parallel.sizes.dp_rank(parallel.rank) == 0 else []  # other dp groups only take part
    executor = build(path, device, parallel)
    actual = logits(executor, mine)
    num_moved, together = executor.balancer.num_moved, times(executor, sequences)
    distance = ((actual - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item() if mine else 0.0
    assert distance < MOST_DISTANCE, f"{case['name']}: {distance:.2e} from one rank"
    assert (num_moved > 0) == (sizes.rebalance_steps > 0)
    return {"distance": distance, "alone": alone, "together": together}


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    without_multicast()
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=240),
                            device_id=device)
    results = {}
    for case in json.loads((folder / "cases.json").read_text()):
        results[case["name"]] = run_case(case, device)
        if rank == 0:
            print(case["name"], results[case["name"]], flush=True)
    (folder / f"result-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
