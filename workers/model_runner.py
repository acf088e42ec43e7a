"""Runs a model over batches: the one place where Python lists become tensors. Decides nothing about which sequences run."""

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import Ops, ops_for
from kernels.plan import Rotary, make_plan
from workers.batch import Agreed, ForwardBatch
from workers.expert_balancer import ExpertBalancer
from workers.halves import halves
from workers.kv_cache import KVCache
from workers.loader import Checkpoint, Progress, weights_hash
from workers.model.decoder import Decoder
from workers.model.deepseek import deepseek
from workers.model.llama import llama
from workers.model.rope import rotation_table
from workers.model.step import Step
from workers.model_config import ModelConfig
from workers.parallel import ONE, Parallel

logger = logging.getLogger(__name__)

class Builder(Protocol):
    def __call__(self, weights: Checkpoint, config: ModelConfig, ops: Ops, num_threads: int, parallel: Parallel = ONE, /) -> Decoder: ...


BUILDERS: dict[str, Builder] = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "DeepseekV2ForCausalLM": deepseek,
    "DeepseekV3ForCausalLM": deepseek,
}


class ModelRunner:
    """One model with its weights and its KV pool on one device.

    `parallel` says which part of it is this rank's: the ranks of a dp group then make the same calls with the same batches, and with
    MOE_MODE=EP those of other groups make as many, with batches of their own or empty ones. `dtype` None means the checkpoint's own.
    `progress` is called from loading threads, one at a time, with (loaded, total) bytes.
    Raises ConfigError for a model that cannot be run or a pool that does not fit.
    """

    def __init__(self, model_dir: Path, device: torch.device | str, dtype: torch.dtype | None, num_pages: int, page_size: int,
                 load_workers: int = 1, progress: Progress | None = None, parallel: Parallel = ONE) -> None:
        self.config = ModelConfig.from_dir(model_dir)
        self._sizes = sizes = parallel.sizes
        sizes.validate(self.config)
        self.device = torch.device(device)
        self.dtype = dtype or getattr(torch, self.config.dtype)
        self.page_size = page_size
        self.kv_cache = KVCache.create(sizes.local(self.config), num_pages, page_size, self.dtype, self.device, weights_hash(model_dir),
                                       tp_size=sizes.attn_tp, whole=self.config)
        checkpoint = Checkpoint(model_dir, self.config, self.dtype, self.device, progress)
        self._model = BUILDERS[self.config.architecture](checkpoint, self.config, ops_for(self.device), load_workers, parallel)
        checkpoint.finish()
        self.balancer = ExpertBalancer(self._model.spread, parallel.world, sizes.rebalance_steps)
        self._rotations = rotation_table(self.config.rope, self.config.max_position, self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute all new tokens of `batch` and keep their keys and values.

        Returns logits [len(batch.logit_rows), vocab_size] float32 on the runner's device, in the order of logit_rows.
        """
        agreed = self._sizes.agreed(batch)
        capacity = self._sizes.capacity(agreed)
        if self._sizes.decode_overlap if agreed is not None and agreed.is_decode else self._sizes.prefill_overlap:
            first, second = halves(batch, -(-len(batch.token_ids) // 2))
            capacity = -(-capacity // 2)
            logits = self._model.both(self._step(first, capacity), self._step(second, capacity), self.kv_cache.layers)
        else:
            logits = self._model(self._step(batch, capacity), self.kv_cache.layers)
        self.balancer.after_step()
        return logits

    def warmup(self) -> None:
        """Run a prefill and a decode over the first page, so that the first request does not pay for lazy set-up. Before any request."""
        length = min(self.page_size, 16, self.config.max_position)
        slots = list(range(length))
        self.forward(ForwardBatch([0] * length, slots, slots, [length], [length], [[0]], [length - 1],
                                  agreed=Agreed(length, is_decode=False)))
        self.forward(ForwardBatch([0], slots[-1:], slots[-1:], [1], [length], [[0]], [0], agreed=Agreed(1, is_decode=True)))
        self.balancer.start()

    def _step(self, batch: ForwardBatch, capacity: int) -> Step:
        num_tokens = len(batch.token_ids)
        assert num_tokens == sum(batch.query_lens) == len(batch.positions) == len(batch.slot_mapping)
        rows = [batch.token_ids, batch.positions, batch.slot_mapping]
        token_ids, positions, slots = torch.tensor(rows, dtype=torch.int64, device=self.device)
        is_every_row = len(batch.logit_rows) == num_tokens
        return Step(
            token_ids=token_ids,
            rotary=Rotary(self._rotations, positions),
            slots=slots,
            logit_rows=None if is_every_row else torch.tensor(batch.logit_rows, dtype=torch.int64, device=self.device),
            plan=make_plan(batch.query_lens, batch.seq_lens, batch.page_tables, self.page_size, self.device, self.dtype),
            capacity=capacity,
        )
