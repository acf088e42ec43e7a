"""Runs steps on a GPU and never waits for it: the host prepares the next step while one runs.

A step of decodes alone is one CUDA graph, captured per batch size and padded up to the next; a step with chunks of prompts is
launched operation by operation. All work is on one stream, so a step sees what the one before wrote, its samples included.

    host     prepare n+1 | launch | take in the tokens of n | prepare n+2 | …
    GPU      step n ......................| step n+1 ....................| …
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from coordinator.errors import ConfigError
from kernels.ops import Ops, Routed, Routing, ops_for
from workers.batch import Agreed, ForwardBatch
from workers.device_inputs import DeviceInputs, InputSizes, host_zeros
from workers.device_sampler import DeviceSampler
from workers.engine_sizes import EngineSizes
from workers.expert_balancer import ExpertBalancer
from workers.halves import halves
from workers.kv_cache import KVCache, bytes_per_page
from workers.loader import Checkpoint, Progress, weights_hash
from workers.model.rope import rotation_table
from workers.model.step import Step
from workers.model_config import ModelConfig
from workers.model_runner import BUILDERS
from workers.parallel import ONE, Parallel
from workers.sequence import Sequence
from workers.settings import EngineSettings

log = logging.getLogger(__name__)

GRAPH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 320, 384, 448, 512)
WARM_PREFILLS = (1, 7, 33, 64, 250, 512, 1024, 2047, 4096)  # chunk sizes with configurations of their own
WARM_DECODES = (1, 7, 16)            # beside a chunk
RESERVED_BYTES = 2 << 30             # activations beyond those of a full chunk, the libraries' own


@dataclass(slots=True)
class CudaFlight:
    """A step under way. `ids` and `logprobs` are pinned memory that the device is still writing to."""

    ids: Tensor
    logprobs: Tensor
    is_done: torch.cuda.Event | None

    def result(self) -> tuple[list[int], list[float]]:
        """Waits for the step. Only once, and before the step after the next is launched."""
        if self.is_done is not None:
            self.is_done.synchronize()
        return self.ids.tolist(), self.logprobs.tolist()


class CudaExecutor:
    """A loaded model, its KV pool and its sampler on one GPU.

    `num_pages` 0: as many as `mem_fraction` of the device's memory leaves room for beside the weights and a full chunk. Of several
    ranks each computes its part of the model: all launch the same batches, those that do not draw with nothing sampled, and other dp
    groups of an EP deployment batches of their own, or empty ones.
    Raises ConfigError for a model or sizes that cannot be run.
    """

    def __init__(self, config: ModelConfig, weights: Checkpoint, *, device: torch.device, dtype: torch.dtype, num_pages: int,
                 page_size: int = 64, max_num_seqs: int = 256, max_seq_len: int = 16384, chunk_size: int = 8192,
                 graph_max_batch_size: int = 256, use_cuda_graphs: bool = True, mem_fraction: float = 0.9, load_workers: int = 1,
                 weights_id: str = "", depth: int = 2, ops: Ops | None = None,
                 parallel: Parallel = ONE) -> None:
        """`ops` None: the device's own. Under Triton's interpreter those for GPUs also run on a CPU, without graphs."""
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        self.config, self.device, self.depth = config, device, depth
        self.page_size, self.chunk_size, self.max_num_seqs = page_size, chunk_size, max_num_seqs
        self._routed: list[Tensor] | None = None   # each layer's choice of experts, while they are counted
        self._ops = ops or ops_for(device)
        self._parallel, self._sizes = parallel, parallel.sizes
        self._sizes.validate(config, keeps_fp8=weights.keeps_fp8)
        self._local = self._sizes.local(config)
        self._model = BUILDERS[config.architecture](weights, config, replace(self._ops, route=self._route), load_workers, parallel)
        weights.finish()
        if self._is_cuda:
            torch.cuda.empty_cache()  # what packing took beside the weights, several layers at a time: a neighbour may need it
        self.balancer = ExpertBalancer(self._model.spread, parallel.world, self._sizes.rebalance_steps)
        self._width = -(-max_seq_len // page_size)
        self._samples = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._sampler = DeviceSampler(sorted(eos for eos in config.eos_ids if eos < config.vocab_size), max_num_seqs, config.vocab_size,
                                      device)
        input_sizes = InputSizes(max_num_seqs=max_num_seqs, max_tokens=chunk_size + max_num_seqs, width=self._width, page_size=page_size)
        rotations = rotation_table(config.rope, config.max_position, device)
        num_inputs = 2 if self._sizes.prefill_overlap or self._sizes.decode_overlap else 1
        self._inputs = [DeviceInputs(input_sizes, self._local, rotations, self._samples) for _ in range(num_inputs)]
        self._results = [(host_zeros(device, torch.int64, max_num_seqs), host_zeros(device, torch.float32, max_num_seqs))
                         for _ in range(self.depth + 1)]
        self._num_launched = 0
        has_graphs = use_cuda_graphs and not (self._sizes.is_ep and self._sizes.exchange == "exact")  # which asks the host
        self._graph_sizes = [size for size in GRAPH_SIZES if size <= min(graph_max_batch_size, max_num_seqs)] if has_graphs else []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.num_pages = num_pages or parallel.world.least(self._pages_that_fit(mem_fraction, dtype), device)
        self.kv_cache = KVCache.create(self._local, self.num_pages, page_size, dtype, device, weights_id,
                                       tp_size=self._sizes.attn_tp, whole=config)

    @classmethod
    def create(cls, settings: EngineSettings, config: ModelConfig, sizes: EngineSizes, progress: Progress | None,
               parallel: Parallel = ONE) -> "CudaExecutor":
        """From a checkpoint on disk."""
        model_dir, device = Path(settings.model_dir), torch.device(settings.device)
        return cls(config, Checkpoint(model_dir, config, sizes.dtype, device, progress), device=device, dtype=sizes.dtype,
                   num_pages=sizes.num_pages, page_size=sizes.page_size, max_num_seqs=sizes.max_num_seqs, max_seq_len=sizes.max_seq_len,
                   chunk_size=sizes.chunk_size, graph_max_batch_size=settings.graph_max_batch_size,
                   use_cuda_graphs=settings.use_cuda_graphs, mem_fraction=settings.mem_fraction, load_workers=settings.load_workers,
                   weights_id=weights_hash(model_dir), depth=settings.depth or 2, parallel=parallel)

    @torch.inference_mode()
    def launch(self, batch: ForwardBatch, sampled: list[Sequence]) -> CudaFlight:
        """Start a step. `sampled` are the sequences whose next token is drawn, in the order of batch.logit_rows."""
        logits = self._forward(batch)
        ids, logprobs = self._results[self._num_launched % len(self._results)]
        self._num_launched += 1
        if sampled:
            drawn, scores = self._sampler.launch(logits, sampled)
            self._samples[: len(sampled)].copy_(drawn)
            ids[: len(sampled)].copy_(drawn, non_blocking=True)
            logprobs[: len(sampled)].copy_(scores, non_blocking=True)
        if batch.logit_rows:  # the others' next step carries these tokens too
            self._parallel.attn.broadcast(self._samples[: len(batch.logit_rows)], 0)
        self.balancer.after_step()
        is_done = None
        if self._is_cuda:
            is_done = torch.cuda.Event()
            is_done.record()
        return CudaFlight(ids[: len(sampled)], logprobs[: len(sampled)], is_done)

    def follow(self, batch: ForwardBatch) -> None:
        """The step that the rank that draws has launched: nothing is sampled here, the drawn tokens are taken over."""
        self.launch(batch, [])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture everything that serving may need. Before any request; overwrites pages."""
        largest = min(self.chunk_size, self.num_pages * self.page_size, self.config.max_position, self._width * self.page_size)
        for length in sorted({min(length, largest) for length in (*WARM_PREFILLS, largest)}):
            self._warm_prefill(length)
        for num_decodes in sorted({min(count, self.max_num_seqs) for count in (*WARM_DECODES, self.max_num_seqs)}):
            self._warm_prefill(largest, num_decodes)
        for size in reversed(self._graph_sizes):
            self._capture(size)
        if not self._graph_sizes:
            self._forward(_one_decode())
        self._sampler.warm_up()
        self.balancer.start()
        self._synchronize()

    def _warm_prefill(self, length: int, num_decodes: int = 0) -> None:
        """One prompt, and beside it decodes of one token each."""
        pages, ones = list(range(-(-length // self.page_size))), [1] * num_decodes
        num_rows = num_decodes + length
        self._forward(ForwardBatch(token_ids=[0] * num_rows, positions=[*[0] * num_decodes, *range(length)], slot_mapping=[],
                                   query_lens=[*ones, length], seq_lens=[*ones, length], page_tables=[*[pages] * num_decodes, pages],
                                   logit_rows=[*range(num_decodes), num_rows - 1], carried=[-1] * (num_decodes + 1),
                                   agreed=Agreed(num_rows, is_decode=False)))
        self._synchronize()

    @torch.inference_mode()
    def count_experts(self) -> float | None:
        """Distinct routed experts per layer in the last step, on average, found by running its decodes once more. None if it had none.

        Waits for the device: for benches.
        """
        num_rows, moe = self._inputs[0].num_valid, self.config.moe
        if moe is None or not num_rows:
            return None
        self._routed = []
        self._model(self._inputs[0].decodes(num_rows, is_padded=False), self.kv_cache.layers)
        routed, self._routed = self._routed, None
        counts = [int((ids[:, : moe.num_experts_per_token].unique() >= 0).sum()) for ids in routed]
        return sum(counts) / len(counts)

    def _route(self, logits: Tensor, routing: Routing, num_valid: Tensor | None) -> Routed:
        routed = self._ops.route(logits, routing, num_valid)
        if self._routed is not None:
            self._routed.append(routed.ids)
        return routed

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self.device)

    # ---- one step ----

    def _forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [rows, vocab] float32, the wanted rows first."""
        size = self._graph_size(batch)
        if size in self._graphs:
            graph, logits = self._graphs[size]
            parts, sizes = self._parts(batch, self._half(size)), self._part_sizes(size)
            for inputs, part, part_size in zip(self._inputs, parts, sizes, strict=False):
                inputs.fill(part, part_size)
            graph.replay()
            return logits
        parts = self._parts(batch, self._half(len(batch.token_ids)))
        capacity = -(-self._sizes.capacity(self._sizes.agreed(batch)) // len(parts))
        return self._run([inputs.eager(part, capacity) for inputs, part in zip(self._inputs, parts, strict=False)])

    def _graph_size(self, batch: ForwardBatch) -> int:
        """Rows of the graph for this step, the same on all ranks that step together; 0: it is none of decodes alone, or too large."""
        agreed = self._sizes.agreed(batch)
        if agreed is None or not agreed.is_decode:
            return 0
        return next((size for size in self._graph_sizes if size >= agreed.num_rows), 0)

    def _is_halved(self, *, is_decode: bool) -> bool:
        return self._sizes.decode_overlap if is_decode else self._sizes.prefill_overlap

    def _parts(self, batch: ForwardBatch, middle: int) -> tuple[ForwardBatch, ...]:
        """The batch, or its halves, `middle` rows in the first as far as they go."""
        agreed = self._sizes.agreed(batch)
        return halves(batch, middle) if self._is_halved(is_decode=agreed is not None and agreed.is_decode) else (batch,)

    def _part_sizes(self, size: int) -> tuple[int, ...]:
        """Rows of each part of a step in a graph of `size` rows."""
        return (self._half(size), self._half(size)) if self._is_halved(is_decode=True) else (size,)

    def _half(self, count: int) -> int:
        return -(-count // 2)

    def _run(self, steps: list[Step]) -> Tensor:
        first, *second = steps
        if not second:
            return self._model(first, self.kv_cache.layers)
        return self._model.both(first, second[0], self.kv_cache.layers)

    def _decode(self, size: int) -> Tensor:
        """What a graph of `size` rows holds: its parts over what was filled in, each padded to its rows."""
        sizes = self._part_sizes(size)
        return self._run([inputs.decodes(rows, is_padded=True, capacity=rows if self._sizes.is_ep else 0)
                          for inputs, rows in zip(self._inputs, sizes, strict=False)])

    def _capture(self, size: int) -> None:
        for inputs, rows in zip(self._inputs, self._part_sizes(size), strict=False):
            inputs.clear(rows)
        self._decode(size)  # compiles, and lets libraries allocate what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        # Other threads, such as NCCL's watchdog, may talk to the device meanwhile.
        mode = "global" if self._sizes.tp == 1 else "thread_local"
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            logits = self._decode(size)
        self._graphs[size] = graph, logits

    def _pages_that_fit(self, mem_fraction: float, dtype: torch.dtype) -> int:
        """What is left when the weights are there and a full chunk has shown what it takes at most."""
        probe = -(-min(self.chunk_size, self.config.max_position) // self.page_size)
        self.num_pages = probe
        self.kv_cache = KVCache.create(self._local, probe, self.page_size, dtype, self.device)
        with torch.inference_mode():
            self._warm_prefill(min(self.chunk_size, self.config.max_position))
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        log.info("weights and activations %.1f GB, %.1f of %.1f GB free", held / 1e9, free / 1e9, total / 1e9)
        room = free - int(total * (1 - mem_fraction)) - RESERVED_BYTES
        num_pages = room // bytes_per_page(self._local, self.page_size, dtype)
        if num_pages < 1:
            raise ConfigError(f"mem_fraction {mem_fraction:g}: {free / 1e9:.1f} GB are free beside the weights, too little for a KV pool")
        del self.kv_cache
        return num_pages


def _one_decode() -> ForwardBatch:
    return ForwardBatch(token_ids=[0], positions=[0], slot_mapping=[0], query_lens=[1], seq_lens=[1], page_tables=[[0]], logit_rows=[0],
                        carried=[-1], agreed=Agreed(1, is_decode=True))
