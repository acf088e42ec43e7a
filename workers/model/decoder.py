"""A stack of pre-norm transformer layers: the frame that all supported models share."""

from collections.abc import Callable, Sequence
from typing import Protocol

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
Mlp = Callable[[Tensor, Step], Tensor]                           # [T, D] -> [T, D], or [T, k, D] to be summed over k
MakeMlp = Callable[[str, int], Mlp]                              # (prefix, layer) -> its feed-forward block


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)). What a block adds is added by the norm that follows it, in one pass."""

    def __init__(self, weights: Checkpoint, prefix: str, config: ModelConfig, ops: Ops, attention: Attention,
                 mlp: Mlp) -> None:
        self._attention_norm = weights.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self._mlp_norm = weights.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self._attention = attention
        self._mlp = mlp
        self._ops = ops
        self._eps = config.norm_eps

    def __call__(self, x: Tensor, delta: Tensor | None, step: Step, cache: Tensor) -> Tensor:
        """Takes what the layer before adds to x [T, D], adds it in place, and returns what this layer adds."""
        if delta is None:
            normed = self._ops.rms_norm(x, self._attention_norm, self._eps)
        else:
            normed = self._ops.add_rms_norm(delta, x, self._attention_norm, self._eps)
        delta = self._attention(normed, step, cache)
        return self._mlp(self._ops.add_rms_norm(delta, x, self._mlp_norm, self._eps), step)


class Decoder:
    """Embedding, layers, output projection. Calls must be made in torch.inference_mode."""

    def __init__(self, weights: Checkpoint, config: ModelConfig, ops: Ops, make_attention: MakeAttention, make_mlp: MakeMlp,
                 num_threads: int) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.tensor("model.embed_tokens.weight", *shape)
        self._head = ops.make_head(self._embedding if config.is_tied else weights.tensor("lm_head.weight", *shape))
        self._norm = weights.tensor("model.norm.weight", config.hidden_size)
        self._add_rms_norm = ops.add_rms_norm
        self._eps = config.norm_eps

        def make_layer(index: int) -> Layer:
            prefix = f"model.layers.{index}"
            return Layer(weights, prefix, config, ops, make_attention(f"{prefix}.self_attn"), make_mlp(f"{prefix}.mlp", index))

        self._layers = weights.build(make_layer, range(config.num_layers), num_threads)

    def __call__(self, step: Step, caches: Sequence[Tensor]) -> Tensor:
        """Logits [R, vocab] float32 of the rows that `step` asks for; `caches` has one tensor per layer."""
        x = F.embedding(step.token_ids, self._embedding)
        delta: Tensor | None = None
        for layer, cache in zip(self._layers, caches, strict=True):
            delta = layer(x, delta, step, cache)
        assert delta is not None
        if step.logit_rows is not None:
            x, delta = x.index_select(0, step.logit_rows), delta.index_select(0, step.logit_rows)
        return self._head(self._add_rms_norm(delta, x, self._norm, self._eps))
