"""Multi-head latent attention (DeepSeek-V2, section 2.1): the cache holds one latent per token, shared by all heads.

A prefill chunk decompresses keys and values of every head from the latents. A decode step would decompress the whole context for
one query; instead W_UK is absorbed into the query and W_UV into the output, and attention runs on the latents themselves.
"""

import torch
from torch import Tensor

from kernels.attention import MlaWeights
from kernels.block_fp8 import BlockFp8
from kernels.ops import Ops
from workers.loader import Checkpoint
from workers.model.rope import pair_neighbours, softmax_scale
from workers.model.step import Step
from workers.model.summed_linear import SummedLinear
from workers.model_config import MlaConfig, ModelConfig
from workers.parallel import Parallel, RankGroup

LATENT_NORM_EPS = 1e-6  # the published models' own, apart from the config's rms_norm_eps


class MlaAttention:
    """H heads of nope + rope query dimensions, a rank's own; a latent of R + rope numbers per token, the same on every rank."""

    def __init__(self, weights: Checkpoint, prefix: str, model: ModelConfig, ops: Ops, parallel: Parallel) -> None:
        config, ranks = parallel.sizes.local(model), parallel.attn
        mla = config.mla
        assert mla is not None
        self._ops = ops
        self._mla = mla
        self._dtype = weights.dtype
        self._head_dim = config.head_dim
        self._scale = softmax_scale(config.rope, config.head_dim)
        self._latent_norm = weights.tensor(f"{prefix}.kv_a_layernorm.weight", mla.kv_lora_rank)
        self._read_down(weights, prefix, config, mla, ranks)
        per_head = mla.nope_dim + mla.v_dim
        kv_b = weights.tensor(f"{prefix}.kv_b_proj.weight", config.num_heads * per_head, mla.kv_lora_rank,
                              cut=ranks.cut(0, model.num_heads * per_head))
        self._kv_b = MlaWeights.split(kv_b.view(config.num_heads, per_head, mla.kv_lora_rank), mla.nope_dim)
        self._o = SummedLinear(weights, f"{prefix}.o_proj", ops, model.hidden_size, model.num_heads * mla.v_dim, ranks,
                               has_bias=model.has_o_bias)

    def __call__(self, x: Tensor, step: Step, cache: Tensor) -> Tensor:
        ops = self._ops
        q, latent = self._down(x).tensor_split((self._q_width,), -1)
        if self._mla.q_lora_rank is not None:
            q = self._q_b(ops.rms_norm(q, self._q_norm, LATENT_NORM_EPS))
        q = torch.unflatten(q, -1, (-1, self._head_dim))
        ops.store_mla(q, latent, self._latent_norm, LATENT_NORM_EPS, step.rotary, step.slots, cache)
        return self._o(ops.attend_mla(q, cache, step.plan, self._kv_b, self._scale).flatten(1))

    def _read_down(self, weights: Checkpoint, prefix: str, config: ModelConfig, mla: MlaConfig, ranks: RankGroup) -> None:
        """The first product of the layer gives the queries (or their latent) and the new cache row at once."""
        q_rows = config.num_heads * config.head_dim
        kv_rows = mla.kv_lora_rank + mla.rope_dim
        is_low_rank = mla.q_lora_rank is not None
        self._q_width = mla.q_lora_rank or q_rows
        rows = (self._q_width, kv_rows)
        names = [f"{prefix}.{'q_a_proj' if is_low_rank else 'q_proj'}", f"{prefix}.kv_a_proj_with_mqa"]
        heads = ranks.cut(0, q_rows * ranks.size)
        down = weights.linear([f"{name}.weight" for name in names], [sum(rows), config.hidden_size], rows=rows,
                              cuts=[None if is_low_rank else heads, None])
        bias: Tensor | None = None
        if config.has_qkv_bias:  # of the two latents' projections; a full-rank q_proj has none
            bias = torch.zeros(sum(rows), dtype=weights.dtype, device=weights.device)
            for name, part in list(zip(names, bias.split_with_sizes(rows), strict=True))[0 if is_low_rank else 1 :]:
                weights.fill(part, f"{name}.bias")
            bias[self._q_width :] = self._reordered(bias[self._q_width :], 1, config)
        if is_low_rank:
            q_b = weights.linear([f"{prefix}.q_b_proj.weight"], [q_rows, self._q_width], cuts=[heads])
            self._q_b = self._ops.make_linear(self._reordered_linear(q_b, config, (q_rows, config.num_heads)), None)
            self._q_norm = weights.tensor(f"{prefix}.q_a_layernorm.weight", self._q_width)
        queries = (self._q_width, 0 if is_low_rank else config.num_heads)
        self._down = self._ops.make_linear(self._reordered_linear(down, config, queries, (kv_rows, 1)), bias)

    def _reordered_linear(self, weight: Tensor | BlockFp8, config: ModelConfig, *parts: tuple[int, int]) -> Tensor | BlockFp8:
        """`parts` are (rows, heads among them, 0 where nothing is rotated) from the top."""
        if config.rope.interleaved:
            return weight
        plain = weight.dequantized(self._dtype) if isinstance(weight, BlockFp8) else weight
        pieces = zip(plain.split_with_sizes([rows for rows, _ in parts]), parts, strict=True)
        return torch.cat([self._reordered(piece, heads, config) if heads else piece for piece, (_, heads) in pieces])

    def _reordered(self, weight: Tensor, num_heads: int, config: ModelConfig) -> Tensor:
        return pair_neighbours(torch.unflatten(weight, 0, (num_heads, -1)), config.rope).flatten(0, 1)
