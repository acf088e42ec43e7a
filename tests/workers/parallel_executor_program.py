"""One rank of two with the executor for GPUs, interpreted on the CPU: fails where its tokens are not those of the plain model on one rank.

    python tests/workers/parallel_executor_program.py FOLDER RANK RANKS

The folder holds cases.json: [{model, sizes}]. Every token is carried over on the device, so ranks that do not draw must have been told.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from coordinator.sampling import SamplingParams
from kernels.cuda import CUDA
from workers.batch import Agreed, ForwardBatch
from workers.cuda_executor import CudaExecutor
from workers.loader import Checkpoint
from workers.model_config import ModelConfig
from workers.model_runner import ModelRunner
from workers.parallel import Parallel, ParallelSizes
from workers.sequence import Sequence

PAGE_SIZE, NUM_PAGES, CPU = 16, 12, torch.device("cpu")
PROMPT, CHUNK, NUM_NEW = 21, 13, 4
PAGES = [5, 2, 7]


def batch_of(token_ids: list[int], start: int, count: int, carried: int = -1, agreed: Agreed | None = None) -> ForwardBatch:
    end = start + count
    slots = [PAGES[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, end)]
    rows = [count - 1] if end >= len(token_ids) else []
    known = token_ids[start:end] if carried < 0 else [0]
    return ForwardBatch(known, list(range(start, end)), slots, [count], [end], [PAGES], rows, [carried], agreed)


def greedy(runner: ModelRunner, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    runner.forward(batch_of(tokens, 0, CHUNK))
    start = CHUNK
    while len(tokens) < len(prompt) + NUM_NEW:
        tokens.append(int(runner.forward(batch_of(tokens, start, len(tokens) - start)).argmax()))
        start = len(tokens) - 1
    return tokens[len(prompt) :]


def empty(agreed: Agreed) -> ForwardBatch:
    return ForwardBatch([], [], [], [], [], [], [], [], agreed)


def run(executor: CudaExecutor, prompt: list[int], parallel: Parallel) -> list[int]:
    """Of the first dp group; the others have no work but take part."""
    has_work = parallel.sizes.dp_rank(parallel.rank) == 0
    draws = has_work and parallel.attn.rank == 0
    params = SamplingParams(do_sample=False, max_new_tokens=9)
    sequence = Sequence(job_id="job", token_ids=list(prompt), num_prompt=len(prompt), params=params, max_kv_tokens=40, page_table=PAGES)
    output: list[int] = []
    for step, (start, count) in enumerate([(0, CHUNK), (CHUNK, PROMPT - CHUNK), *((PROMPT + i, 1) for i in range(NUM_NEW - 1))]):
        agreed = Agreed(count, is_decode=count == 1)
        if not has_work:
            executor.launch(empty(agreed), [])
            continue
        batch = batch_of([*prompt, *output], start, count, 0 if step > 1 else -1, agreed)
        ids, _ = executor.launch(batch, [sequence] if draws and step else []).result()
        if step:
            output += ids if draws else [0]
            sequence.token_ids += ids
        sequence.num_computed = start + count
    return output if draws else []


def run_case(case: dict[str, Any]) -> None:
    path, parallel = Path(case["model"]), Parallel.join(ParallelSizes(**case["sizes"]))
    config = ModelConfig.from_dir(path)
    prompt = torch.randint(0, config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(4)).tolist()
    executor = CudaExecutor(config, Checkpoint(path, config, torch.float32, CPU), device=CPU, dtype=torch.float32, num_pages=NUM_PAGES,
                            page_size=PAGE_SIZE, max_num_seqs=4, max_seq_len=128, chunk_size=64, use_cuda_graphs=False, ops=CUDA,
                            parallel=parallel)
    output = run(executor, prompt, parallel)
    if parallel.rank == 0:
        expected = greedy(ModelRunner(path, "cpu", torch.float32, NUM_PAGES, PAGE_SIZE), prompt)
        assert output == expected, f"{case}: {output}, expected {expected}"


def main() -> None:
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=200))
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(case)
    (folder / f"result-{rank}.json").write_text("{}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
