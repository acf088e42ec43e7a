"""A stack of pre-norm transformer layers: the frame that all supported models share."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.step import Step
from workers.model_config import ModelConfig


class Attention(Protocol):
    def __call__(self, x: Tensor, step: Step, cache: Tensor, /) -> Tensor:
        """[T, D] -> [T, D]; stores the new tokens' keys and values in this layer's cache first."""
        ...


MakeAttention = Callable[[str], Attention]                       # (prefix) -> the attention of one layer
MakeMlp = Callable[[str, int], Callable[[Tensor], Tensor]]       # (prefix, layer) -> its feed-forward block


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, weights: Checkpoint, prefix: str, config: ModelConfig, ops: Ops, attention: Attention,
                 mlp: Callable[[Tensor], Tensor]) -> None:
        self._attention_norm = weights.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self._mlp_norm = weights.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self._attention = attention
        self._mlp = mlp
        self._rms_norm = ops.rms_norm
        self._eps = config.norm_eps

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> None:
        """Adds this layer's part to x [T, D] in place."""
        x += self._attention(self._rms_norm(x, self._attention_norm, self._eps), step, cache)
        x += self._mlp(self._rms_norm(x, self._mlp_norm, self._eps))


class Decoder:
    """Embedding, layers, output projection. Calls must be made in torch.inference_mode."""

    def __init__(self, weights: Checkpoint, config: ModelConfig, ops: Ops, make_attention: MakeAttention, make_mlp: MakeMlp,
                 num_threads: int) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.tensor("model.embed_tokens.weight", *shape)
        self._output = ops.make_linear(self._embedding if config.is_tied else weights.tensor("lm_head.weight", *shape), None)
        self._norm = weights.tensor("model.norm.weight", config.hidden_size)
        self._rms_norm = ops.rms_norm
        self._eps = config.norm_eps

        def make_layer(index: int) -> Layer:
            prefix = f"model.layers.{index}"
            return Layer(weights, prefix, config, ops, make_attention(f"{prefix}.self_attn"), make_mlp(f"{prefix}.mlp", index))

        self._layers = weights.build(make_layer, range(config.num_layers), num_threads)

    def __call__(self, step: Step, caches: Sequence[Tensor]) -> Tensor:
        """Logits [R, vocab] float32 of the rows that `step` asks for; `caches` has one tensor per layer."""
        x = F.embedding(step.token_ids, self._embedding)
        for layer, cache in zip(self._layers, caches, strict=True):
            layer(x, step, cache)
        if step.logit_rows is not None:
            x = x.index_select(0, step.logit_rows)
        return self._output(self._rms_norm(x, self._norm, self._eps)).to(torch.float32)
