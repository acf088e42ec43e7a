"""A stack of pre-norm transformer layers: the frame that all supported models share.

A forward pass is made of `turns`: run straight on, it is a plain pass; two of them in turns hide what travels for each behind the
computation of the other.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.spread_moe import SpreadMoe
from workers.model.step import Step
from workers.model.turns import MlpSteps, Steps, run, run_both
from workers.model.vocabulary import Vocabulary
from workers.model_config import ModelConfig
from workers.parallel import RankGroup


class Attention(Protocol):
    def __call__(self, x: Tensor, step: Step, cache: Tensor, /) -> Tensor:
        """[T, D] -> [T, D]; stores the new tokens' keys and values in this layer's cache first."""
        ...


MakeAttention = Callable[[str], Attention]                       # (prefix) -> the attention of one layer
MakeMlp = Callable[[str, int], MlpSteps]                         # (prefix, layer) -> its feed-forward block


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x)). What a block adds is added by the norm that follows it, in one pass."""

    def __init__(self, weights: Checkpoint, prefix: str, config: ModelConfig, ops: Ops, attention: Attention,
                 mlp: MlpSteps) -> None:
        self._attention_norm = weights.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size)
        self._mlp_norm = weights.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
        self._attention = attention
        self._mlp = mlp
        self._ops = ops
        self._eps = config.norm_eps

    def __call__(self, x: Tensor, delta: Tensor | None, step: Step, cache: Tensor) -> Steps:
        """Takes what the layer before adds to x [T, D], adds it in place, and returns what this layer adds."""
        if delta is None:
            normed = self._ops.rms_norm(x, self._attention_norm, self._eps)
        else:
            normed = self._ops.add_rms_norm(delta, x, self._attention_norm, self._eps)
        delta = self._attention(normed, step, cache)
        return (yield from self._mlp(self._ops.add_rms_norm(delta, x, self._mlp_norm, self._eps), step))


class Decoder:
    """Embedding, layers, output projection. Calls must be made in torch.inference_mode."""

    def __init__(self, weights: Checkpoint, config: ModelConfig, ops: Ops, make_attention: MakeAttention, make_mlp: MakeMlp,
                 num_threads: int, ranks: RankGroup) -> None:
        self._vocabulary = Vocabulary(weights, config, ops, ranks)
        self._norm = weights.tensor("model.norm.weight", config.hidden_size)
        self._add_rms_norm = ops.add_rms_norm
        self._eps = config.norm_eps

        def make_layer(index: int) -> Layer:
            prefix = f"model.layers.{index}"
            return Layer(weights, prefix, config, ops, make_attention(f"{prefix}.self_attn"), make_mlp(f"{prefix}.mlp", index))

        self._layers = weights.build(make_layer, range(config.num_layers), num_threads)
        self.spread: list[SpreadMoe] = []  # its blocks whose experts are spread over ranks, layer by layer

    def __call__(self, step: Step, caches: Sequence[Tensor]) -> Tensor:
        """Logits [R, vocab] float32 of the rows that `step` asks for; `caches` has one tensor per layer."""
        return run(self.steps(step, caches))

    def both(self, first: Step, second: Step, caches: Sequence[Tensor]) -> Tensor:
        """Two halves of a batch in turns. `second` may go on with sequences of `first`. Logits of first's rows, then of second's."""
        return torch.cat(run_both(self.steps(first, caches), self.steps(second, caches)))

    def steps(self, step: Step, caches: Sequence[Tensor]) -> Steps:
        x = self._vocabulary.embed(step.token_ids)
        delta: Tensor | None = None
        for layer, cache in zip(self._layers, caches, strict=True):
            delta = yield from layer(x, delta, step, cache)
        assert delta is not None
        if step.logit_rows is not None:
            x, delta = x.index_select(0, step.logit_rows), delta.index_select(0, step.logit_rows)
        return self._vocabulary.logits(self._add_rms_norm(delta, x, self._norm, self._eps))
