"""Embedding table and output projection, their rows split over the ranks of a dp group. A last rank's share may end in padding."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import Ops
from workers.cut import Cut
from workers.loader import Checkpoint
from workers.model_config import ModelConfig
from workers.parallel import RankGroup


class Vocabulary:
    def __init__(self, weights: Checkpoint, config: ModelConfig, ops: Ops, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._size = config.vocab_size
        self._per_rank = -(-config.vocab_size // ranks.size)
        self._first = ranks.rank * self._per_rank
        self._table = self._read(weights, "model.embed_tokens.weight", config)
        self._project = ops.make_head(self._table if config.is_tied else self._read(weights, "lm_head.weight", config))

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, D]"""
        if self._ranks.size == 1:
            return F.embedding(token_ids, self._table)
        rows = token_ids - self._first
        is_elsewhere = (rows < 0) | (rows >= self._per_rank)
        x = F.embedding(rows.clamp_(0, self._per_rank - 1), self._table)
        return self._ranks.all_reduce(x.masked_fill_(is_elsewhere.unsqueeze(1), 0.0))

    def logits(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, vocab] float32, the same bits on every rank: any of them may draw tokens."""
        logits = self._project(x)
        if self._ranks.size == 1:
            return logits
        return self._ranks.all_gather(logits).transpose(0, 1).flatten(1)[:, : self._size]

    def _read(self, weights: Checkpoint, name: str, config: ModelConfig) -> Tensor:
        if self._ranks.size == 1:
            return weights.tensor(name, self._size, config.hidden_size)
        table = torch.zeros(self._per_rank, config.hidden_size, dtype=weights.dtype, device=weights.device)
        count = min(max(self._size - self._first, 0), self._per_rank)
        weights.fill(table[:count], name, Cut(0, min(self._first, self._size - count), self._size))
        return table
