"""Runs steps on a GPU and never waits for it: the host prepares the next step while one runs.

A step of decodes alone is one CUDA graph, captured per batch size and padded up to the next; a step with chunks of prompts is
launched operation by operation. All work is on one stream, so a step sees what the one before wrote, its samples included.

    host     prepare n+1 | launch | take in the tokens of n | prepare n+2 | …
    GPU      step n ......................| step n+1 ....................| …
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordinator.errors import ConfigError
from kernels import gqa_decode, mla_decode
from kernels.device_plan import Chunks, DevicePlan
from kernels.ops import Ops, Routed, Routing, ops_for
from kernels.plan import Rotary
from kernels.split_schedule import SplitSchedule
from kernels.step_inputs import decode_inputs, prefill_inputs
from workers.batch import ForwardBatch
from workers.device_sampler import DeviceSampler
from workers.engine_sizes import EngineSizes
from workers.kv_cache import KVCache, bytes_per_page
from workers.loader import Checkpoint, Progress, weights_hash
from workers.model.rope import rotation_table
from workers.model.step import Step
from workers.model_config import ModelConfig
from workers.model_runner import BUILDERS
from workers.sequence import Sequence
from workers.settings import EngineSettings

log = logging.getLogger(__name__)

GRAPH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 320, 384, 448, 512)
MAX_DECOMPRESSED_KEYS = 128 * 1024   # of one attention call over chunks: bounds the memory for their keys and values
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

    `num_pages` 0: as many as `mem_fraction` of the device's memory leaves room for beside the weights and a full chunk.
    Raises ConfigError for a model or sizes that cannot be run.
    """

    def __init__(self, config: ModelConfig, weights: Checkpoint, *, device: torch.device, dtype: torch.dtype, num_pages: int,
                 page_size: int = 64, max_num_seqs: int = 256, max_seq_len: int = 16384, chunk_size: int = 8192,
                 graph_max_batch_size: int = 256, use_cuda_graphs: bool = True, mem_fraction: float = 0.9, load_workers: int = 1,
                 weights_id: str = "", depth: int = 2, ops: Ops | None = None) -> None:
        """`ops` None: the device's own. Under Triton's interpreter those for GPUs also run on a CPU, without graphs."""
        self._is_cuda = device.type == "cuda"
        if self._is_cuda:
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        self.config, self.device, self.depth = config, device, depth
        self.page_size, self.chunk_size, self.max_num_seqs = page_size, chunk_size, max_num_seqs
        self._routed: list[Tensor] | None = None   # each layer's choice of experts, while they are counted
        self._ops = ops or ops_for(device)
        self._model = BUILDERS[config.architecture](weights, config, replace(self._ops, route=self._route), load_workers)
        weights.finish()
        self._rotations = rotation_table(config.rope, config.max_position, device)
        self._width = -(-max_seq_len // page_size)
        self._samples = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._sampler = DeviceSampler(sorted(eos for eos in config.eos_ids if eos < config.vocab_size), max_num_seqs, config.vocab_size,
                                      device)
        self._decodes = _DecodeInputs(max_num_seqs, self._width, page_size, device)
        self._chunks = _ChunkInputs(chunk_size + max_num_seqs, max_num_seqs, self._width, device)
        self._results = [(_host_zeros(device, torch.int64, max_num_seqs), _host_zeros(device, torch.float32, max_num_seqs))
                         for _ in range(self.depth + 1)]
        self._num_launched = 0
        self._schedule = SplitSchedule.allocate(max_num_seqs, _num_splits(config, device), device)
        self._graph_sizes = [size for size in GRAPH_SIZES if size <= min(graph_max_batch_size, max_num_seqs)] if use_cuda_graphs else []
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.num_pages = num_pages or self._pages_that_fit(mem_fraction, dtype)
        self.kv_cache = KVCache.create(config, self.num_pages, page_size, dtype, device, weights_id)

    @classmethod
    def create(cls, settings: EngineSettings, config: ModelConfig, sizes: EngineSizes, progress: Progress | None) -> "CudaExecutor":
        """From a checkpoint on disk."""
        model_dir, device = Path(settings.model_dir), torch.device(settings.device)
        return cls(config, Checkpoint(model_dir, config, sizes.dtype, device, progress), device=device, dtype=sizes.dtype,
                   num_pages=sizes.num_pages, page_size=sizes.page_size, max_num_seqs=sizes.max_num_seqs, max_seq_len=sizes.max_seq_len,
                   chunk_size=sizes.chunk_size, graph_max_batch_size=settings.graph_max_batch_size,
                   use_cuda_graphs=settings.use_cuda_graphs, mem_fraction=settings.mem_fraction, load_workers=settings.load_workers,
                   weights_id=weights_hash(model_dir), depth=settings.depth or 2)

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
        is_done = None
        if self._is_cuda:
            is_done = torch.cuda.Event()
            is_done.record()
        return CudaFlight(ids[: len(sampled)], logprobs[: len(sampled)], is_done)

    @torch.inference_mode()
    def follow(self, batch: ForwardBatch) -> None:
        self._forward(batch)

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
            self._forward(_one_decode(1))
        self._sampler.warm_up()
        self._synchronize()

    def _warm_prefill(self, length: int, num_decodes: int = 0) -> None:
        """One prompt, and beside it decodes of one token each."""
        pages, ones = list(range(-(-length // self.page_size))), [1] * num_decodes
        num_rows = num_decodes + length
        self._forward(ForwardBatch(token_ids=[0] * num_rows, positions=[*[0] * num_decodes, *range(length)], slot_mapping=[],
                                   query_lens=[*ones, length], seq_lens=[*ones, length], page_tables=[*[pages] * num_decodes, pages],
                                   logit_rows=[*range(num_decodes), num_rows - 1], carried=[-1] * (num_decodes + 1)))
        self._synchronize()

    @torch.inference_mode()
    def count_experts(self) -> float | None:
        """Distinct routed experts per layer in the last step, on average, found by running its decodes once more. None if it had none.

        Waits for the device: for benches.
        """
        num_rows, moe = int(self._decodes.num_valid), self.config.moe
        if moe is None or not num_rows:
            return None
        self._routed = []
        self._decode(num_rows, is_padded=False)
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
        num_decodes = _leading_decodes(batch.query_lens)
        is_only_decodes = num_decodes == len(batch.query_lens)
        size = num_decodes
        if is_only_decodes and self._graph_sizes and num_decodes <= self._graph_sizes[-1]:
            size = next(size for size in self._graph_sizes if size >= num_decodes)
        self._decodes.fill(batch, num_decodes, size)
        if is_only_decodes:
            graph = self._graphs.get(size)
            if graph is None:
                return self._decode(size, is_padded=size > num_decodes)
            graph[0].replay()
            return graph[1]
        return self._mixed(batch, num_decodes)

    def _decode(self, size: int, *, is_padded: bool) -> Tensor:
        """A step of decodes over the first `size` rows of the inputs."""
        token_ids, positions, slots = self._chunks.rows(size)
        inputs = self._decodes
        plan = self._plan_decodes(size, token_ids, positions, slots)
        step = Step(token_ids, Rotary(self._rotations, positions), slots, None, plan, inputs.num_valid if is_padded else None)
        return self._model(step, self.kv_cache.layers)

    def _plan_decodes(self, size: int, token_ids: Tensor, positions: Tensor, slots: Tensor) -> DevicePlan:
        inputs = self._decodes
        seq_lens, page_table = inputs.seq_lens[:size], inputs.page_table[:size]
        if size:
            decode_inputs(inputs.tokens[:size], inputs.carried[:size], seq_lens, page_table, self._samples, self.page_size,
                          token_ids[:size], positions[:size], slots[:size])
            self._schedule.refill(seq_lens, size)
        return DevicePlan(self.page_size, size, page_table, seq_lens, self._schedule)

    def _mixed(self, batch: ForwardBatch, num_decodes: int) -> Tensor:
        token_ids, positions, slots = self._chunks.rows(len(batch.token_ids))
        plan = self._plan_decodes(num_decodes, token_ids, positions, slots)
        logit_rows = self._chunks.fill(batch, num_decodes, token_ids, positions, slots, plan, self.page_size)
        return self._model(Step(token_ids, Rotary(self._rotations, positions), slots, logit_rows, plan), self.kv_cache.layers)

    def _capture(self, size: int) -> None:
        self._decodes.clear(size)
        self._decode(size, is_padded=True)  # compiles, and lets libraries allocate what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool):
            logits = self._decode(size, is_padded=True)
        self._graphs[size] = graph, logits

    def _pages_that_fit(self, mem_fraction: float, dtype: torch.dtype) -> int:
        """What is left when the weights are there and a full chunk has shown what it takes at most."""
        probe = -(-min(self.chunk_size, self.config.max_position) // self.page_size)
        self.num_pages = probe
        self.kv_cache = KVCache.create(self.config, probe, self.page_size, dtype, self.device)
        with torch.inference_mode():
            self._warm_prefill(min(self.chunk_size, self.config.max_position))
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        log.info("weights and activations %.1f GB, %.1f of %.1f GB free", held / 1e9, free / 1e9, total / 1e9)
        room = free - int(total * (1 - mem_fraction)) - RESERVED_BYTES
        num_pages = room // bytes_per_page(self.config, self.page_size, dtype)
        if num_pages < 1:
            raise ConfigError(f"mem_fraction {mem_fraction:g}: {free / 1e9:.1f} GB are free beside the weights, too little for a KV pool")
        del self.kv_cache
        return num_pages


class _DecodeInputs:
    """What the host says about decodes, at fixed addresses: a captured graph reads it from there.

    Pinned copies alternate, so that one can be written while the device still reads the other.
    """

    def __init__(self, max_seqs: int, width: int, page_size: int, device: torch.device) -> None:
        self._ints = torch.zeros(3 * max_seqs + 1, dtype=torch.int32, device=device)
        self.tokens, self.carried, self.seq_lens = self._ints[:-1].view(3, max_seqs)
        self.num_valid = self._ints[-1:]
        self.page_table = torch.zeros(max_seqs, width, dtype=torch.int32, device=device)
        self._pinned = [(_host_zeros(device, torch.int32, 3 * max_seqs + 1), _host_zeros(device, torch.int32, max_seqs, width))
                        for _ in range(2)]
        self._table: NDArray[np.int32] = np.zeros((max_seqs, width), dtype=np.int32)
        self._rows: list[tuple[Any, int]] = [(None, 0)] * max_seqs  # the page list that each row shows, and how many of it
        self._turn = 0

    def fill(self, batch: ForwardBatch, num_seqs: int, size: int) -> None:
        if not size:
            return
        self._turn ^= 1
        ints, table = self._pinned[self._turn]
        max_seqs = self.page_table.shape[0]
        values = ints.numpy()
        rows = values[:-1].reshape(3, max_seqs)
        rows[0, :num_seqs] = batch.token_ids[:num_seqs]
        rows[1, :num_seqs] = batch.carried[:num_seqs]
        rows[2, :num_seqs] = batch.seq_lens[:num_seqs]
        rows[2, num_seqs:size] = 0
        values[-1] = num_seqs
        self._ints.copy_(ints, non_blocking=True)
        if self._update(batch.page_tables, num_seqs):
            table.numpy()[:num_seqs] = self._table[:num_seqs]
            self.page_table[:num_seqs].copy_(table[:num_seqs], non_blocking=True)

    def clear(self, size: int) -> None:
        """All rows padding."""
        self.seq_lens[:size] = 0
        self.num_valid.zero_()

    def _update(self, page_tables: list[list[int]], num_seqs: int) -> bool:
        """A row is written only when it shows another sequence or more pages than before: rare in a run of decodes."""
        shown, is_changed = self._rows, False
        for row in range(num_seqs):
            pages = page_tables[row]
            known, count = shown[row]
            if known is pages and count == len(pages):
                continue
            first = count if known is pages and count < len(pages) else 0
            self._table[row, first : len(pages)] = pages[first:]
            shown[row] = pages, len(pages)
            is_changed = True
        return is_changed


class _ChunkInputs:
    """Token rows of a step, and what the host says about chunks of prompts."""

    def __init__(self, max_tokens: int, max_seqs: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros(3, max_tokens, dtype=torch.int64, device=device)
        capacity = max_tokens + max_seqs * (width + 8) + 64
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._pinned = [_host_zeros(device, torch.int32, capacity) for _ in range(2)]
        self._width = width
        self._turn = 0

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """token_ids, positions, slots [count]"""
        return self._rows[0, :count], self._rows[1, :count], self._rows[2, :count]

    def fill(self, batch: ForwardBatch, num_decodes: int, token_ids: Tensor, positions: Tensor, slots: Tensor, plan: DevicePlan,
             page_size: int) -> Tensor:
        """Write rows from num_decodes on, add the chunks to the plan, return logit_rows."""
        self._turn ^= 1
        pinned = self._pinned[self._turn].numpy()
        used = 0

        def put(values: Any, count: int) -> slice:
            nonlocal used
            place = slice(used, used + count)
            pinned[place] = values
            used += -(-count // 16) * 16  # kernels like their pointers aligned
            return place

        num_chunk_tokens = len(batch.token_ids) - num_decodes
        places: list[tuple[list[int], range, tuple[slice, ...]]] = []
        tokens = put(batch.token_ids[num_decodes:], num_chunk_tokens)
        wanted = put(batch.logit_rows, len(batch.logit_rows))
        for group in _groups(batch.seq_lens, num_decodes):
            q = [0, *np.cumsum([batch.query_lens[i] for i in group]).tolist()]
            k = [0, *np.cumsum([batch.seq_lens[i] for i in group]).tolist()]
            table = np.zeros((len(group), self._width), dtype=np.int32)
            for row, i in enumerate(group):
                pages = batch.page_tables[i][: self._width]
                table[row, : len(pages)] = pages
            lens = [batch.seq_lens[i] for i in group]
            places.append((q, group, (put(q, len(q)), put(k, len(k)), put(lens, len(lens)), put(table.ravel(), table.size))))
        self._device[:used].copy_(self._pinned[self._turn][:used], non_blocking=True)
        token_ids[num_decodes:].copy_(self._device[tokens])
        start = num_decodes
        for q, group, (at_q, at_k, at_lens, at_table) in places:
            lens = [batch.seq_lens[i] for i in group]
            chunks = Chunks(start=start, end=start + q[-1], cu_q=self._device[at_q], cu_k=self._device[at_k],
                            seq_lens=self._device[at_lens], page_table=self._device[at_table].view(len(group), self._width),
                            max_q=max(batch.query_lens[i] for i in group), max_k=max(lens), num_keys=sum(lens))
            prefill_inputs(chunks.cu_q, chunks.seq_lens, chunks.page_table, chunks.max_q, page_size, positions[start : chunks.end],
                           slots[start : chunks.end])
            plan.chunks.append(chunks)
            start = chunks.end
        return self._device[wanted].long()


def _host_zeros(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Host memory that copies to and from the device need not be waited for."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


def _groups(seq_lens: list[int], first: int) -> list[range]:
    """Sequences from `first` on, so many at a time that their decompressed keys stay within bounds."""
    groups, begin, total = [], first, 0
    for i in range(first, len(seq_lens)):
        if i > begin and total + seq_lens[i] > MAX_DECOMPRESSED_KEYS:
            groups.append(range(begin, i))
            begin, total = i, 0
        total += seq_lens[i]
    groups.append(range(begin, len(seq_lens)))
    return groups


def _leading_decodes(query_lens: list[int]) -> int:
    for i, query_len in enumerate(query_lens):
        if query_len != 1:
            return i
    return len(query_lens)


def _one_decode(seq_len: int) -> ForwardBatch:
    return ForwardBatch(token_ids=[0], positions=[seq_len - 1], slot_mapping=[seq_len - 1], query_lens=[1], seq_lens=[seq_len],
                        page_tables=[[0]], logit_rows=[0], carried=[-1])


def _num_splits(config: ModelConfig, device: torch.device) -> int:
    if config.mla is not None:
        return mla_decode.num_splits(config.num_heads, device)
    return gqa_decode.num_splits(config.num_kv_heads, config.head_dim, device)
