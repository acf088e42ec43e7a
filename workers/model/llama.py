"""Grouped-query attention, as in Llama and Qwen2."""

import torch
from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.decoder import Decoder
from workers.model.mlp import GatedMlp
from workers.model.rope import pair_neighbours, softmax_scale
from workers.model.step import Step
from workers.model_config import ModelConfig


class GqaAttention:
    """Queries, keys and values come out of one product as [T, H + 2 KV, d]."""

    def __init__(self, weights: Checkpoint, prefix: str, config: ModelConfig, ops: Ops) -> None:
        self._ops = ops
        self._num_heads = config.num_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        self._num_all = config.num_heads + 2 * config.num_kv_heads
        self._scale = softmax_scale(config.rope, config.head_dim)
        bias = self._fused(weights, prefix, "bias", config, []) if config.has_qkv_bias else None
        self._qkv = ops.make_linear(self._fused(weights, prefix, "weight", config, [config.hidden_size]), bias)
        o_bias = weights.tensor(f"{prefix}.o_proj.bias", config.hidden_size) if config.has_o_bias else None
        self._o = ops.make_linear(weights.tensor(f"{prefix}.o_proj.weight", config.hidden_size, config.num_heads * config.head_dim), o_bias)

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        heads = self._qkv(x).view(x.shape[0], self._num_all, -1)
        self._ops.store_gqa(heads, step.rotary, step.slots, cache, self._num_heads)
        return self._o(self._ops.attend_gqa(heads[:, : self._num_heads], cache, step.plan, self._scale).flatten(1))

    def _fused(self, weights: Checkpoint, prefix: str, kind: str, config: ModelConfig, columns: list[int]) -> Tensor:
        rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        names = [f"{prefix}.{part}_proj.{kind}" for part in "qkv"]
        fused = weights.stacked(names, [sum(rows), *columns], rows=rows).view(self._num_all, config.head_dim, *columns)
        return torch.cat((pair_neighbours(fused[: self._num_rotated], config.rope), fused[self._num_rotated :])).flatten(0, 1)


def llama(weights: Checkpoint, config: ModelConfig, ops: Ops, num_threads: int) -> Decoder:
    """Llama and Qwen2, which differs by biases only."""
    return Decoder(
        weights,
        config,
        ops,
        make_attention=lambda prefix: GqaAttention(weights, prefix, config, ops),
        make_mlp=lambda prefix, _: GatedMlp(weights, prefix, ops, config.hidden_size, config.intermediate_size,
                                            has_bias=config.has_mlp_bias),
        num_threads=num_threads,
    )
