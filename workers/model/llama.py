"""Grouped-query attention, as in Llama and Qwen2."""

import torch
from torch import Tensor

from kernels.ops import Ops
from workers.cut import Cut
from workers.loader import Checkpoint
from workers.model.decoder import Decoder
from workers.model.mlp import GatedMlp
from workers.model.rope import pair_neighbours, softmax_scale
from workers.model.step import Step
from workers.model.summed_linear import SummedLinear
from workers.model.turns import at_once
from workers.model_config import ModelConfig
from workers.parallel import ONE, Parallel


class GqaAttention:
    """Queries, keys and values come out of one product as [T, H + 2 KV, d]: of the rank's own H and KV heads."""

    def __init__(self, weights: Checkpoint, prefix: str, model: ModelConfig, ops: Ops, parallel: Parallel) -> None:
        config = parallel.sizes.local(model)
        self._ops = ops
        self._num_heads = config.num_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._num_all = config.num_heads + 2 * config.num_kv_heads
        self._scale = softmax_scale(config.rope, config.head_dim)
        first_kv_head = parallel.sizes.kv_heads(model, parallel.rank).start
        kv = Cut(0, first_kv_head * model.head_dim, model.num_kv_heads * model.head_dim)
        self._cuts = [parallel.attn.cut(0, model.num_heads * model.head_dim), kv, kv]
        bias = self._fused(weights, prefix, "bias", config, []) if config.has_qkv_bias else None
        self._qkv = ops.make_linear(self._fused(weights, prefix, "weight", config, [config.hidden_size]), bias)
        self._o = SummedLinear(weights, f"{prefix}.o_proj", ops, model.hidden_size, model.num_heads * model.head_dim, parallel.attn,
                               has_bias=model.has_o_bias)

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        heads = self._qkv(x).unflatten(-1, (self._num_all, -1))
        self._ops.store_gqa(heads, step.rotary, step.slots, cache, self._num_heads)
        return self._o(self._ops.attend_gqa(heads[:, : self._num_heads], cache, step.plan, self._scale).flatten(1))

    def _fused(self, weights: Checkpoint, prefix: str, kind: str, config: ModelConfig, columns: list[int]) -> Tensor:
        rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        names = [f"{prefix}.{part}_proj.{kind}" for part in "qkv"]
        fused = weights.stacked(names, [sum(rows), *columns], rows=rows, cuts=self._cuts).view(self._num_all, config.head_dim, *columns)
        return torch.cat((pair_neighbours(fused[: self._num_rotated], config.rope), fused[self._num_rotated :])).flatten(0, 1)


def llama(weights: Checkpoint, config: ModelConfig, ops: Ops, num_threads: int, parallel: Parallel = ONE) -> Decoder:
    """Llama and Qwen2, which differs by biases only."""
    return Decoder(
        weights,
        config,
        ops,
        make_attention=lambda prefix: GqaAttention(weights, prefix, config, ops, parallel),
        make_mlp=lambda prefix, _: at_once(GatedMlp(weights, prefix, ops, config.hidden_size, config.intermediate_size, parallel.attn,
                                                    has_bias=config.has_mlp_bias)),
        num_threads=num_threads,
        ranks=parallel.attn,
    )
