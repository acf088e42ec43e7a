"""How fast a DeepSeek-style model can be on one GPU at best: bytes and arithmetic of each operation against two ceilings.

An operation takes max(bytes / bandwidth, operations / arithmetic rate); operations run one after the other. The intermediates of
this list of operations count as memory traffic, so fusing them, or keeping one in L2, gets a little under the floor. Knows no tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from workers.model_config import MlaConfig, ModelConfig, MoeConfig

Rate = Literal["bf16", "fp8", "fp32"]
Phase = Literal["decode", "prefill"]
KERNELS_PER_LAYER = 14  # what is left after fusing, see docs/benchmarks.md
BF16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What one GPU was measured to do at best. The defaults are an H200's."""

    bytes_per_s: float = 4.3e12     # device-to-device copy, bytes read and bytes written
    bf16_flops: float = 790e12      # 8192 x 8192 x 8192, random data
    fp8_flops: float = 1500e12
    fp32_flops: float = 50e12
    launch_s: float = 1.0e-6        # from one kernel to the next inside a CUDA graph

    def flops(self, rate: Rate) -> float:
        return {"bf16": self.bf16_flops, "fp8": self.fp8_flops, "fp32": self.fp32_flops}[rate]

    def floor_s(self, num_bytes: float, num_flops: float, rate: Rate = "bf16") -> float:
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops(rate))


@dataclass(frozen=True, slots=True)
class Op:
    name: str
    num_bytes: float
    num_flops: float = 0.0
    rate: Rate = "bf16"

    def floor_s(self, ceilings: Ceilings) -> float:
        return ceilings.floor_s(self.num_bytes, self.num_flops, self.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One forward pass: `tokens` new tokens, of which `logit_rows` get logits.

    context   decode: tokens that each sequence attends to; prefill: length of the sequences, which are computed whole
    experts   distinct experts that a layer visits, if they were counted; else those that uniform routing would visit
    """

    phase: Phase
    tokens: int
    context: int
    logit_rows: int
    experts: float | None = None

    @classmethod
    def decode(cls, batch: int, context: int, experts: float | None = None) -> "Work":
        return cls(phase="decode", tokens=batch, context=context, logit_rows=batch, experts=experts)

    @classmethod
    def prefill(cls, tokens: int, sequence: int) -> "Work":
        return cls(phase="prefill", tokens=tokens, context=sequence, logit_rows=max(1, tokens // sequence))


def step_floor_s(config: ModelConfig, work: Work, ceilings: Ceilings) -> float:
    """One forward pass of the whole model, without any gap between kernels."""
    return sum(op.floor_s(ceilings) for op in step_ops(config, work))


def launch_gaps_s(config: ModelConfig, ceilings: Ceilings) -> float:
    """What the gaps between the kernels of one forward pass add in a CUDA graph."""
    return config.num_layers * KERNELS_PER_LAYER * ceilings.launch_s


def total_bytes(ops: Iterable[Op]) -> float:
    return sum(op.num_bytes for op in ops)


def step_ops(config: ModelConfig, work: Work) -> list[Op]:
    """All layers, then the output projection. Raises ValueError for a model without latent attention."""
    ops = [op for layer in range(config.num_layers) for op in layer_ops(config, work, layer)]
    return [*ops, _gemm("output projection", work.logit_rows, config.hidden_size, config.vocab_size, BF16_BYTES)]


def layer_ops(config: ModelConfig, work: Work, layer: int) -> list[Op]:
    if config.mla is None:
        raise ValueError(f"{config.architecture}: only models with latent attention are counted")
    norms = Op("rms norms and residual", 2 * work.tokens * config.hidden_size * BF16_BYTES * 4)
    is_moe = config.moe is not None and layer >= config.moe.first_layer
    block = _moe_ops(config, config.moe, work) if is_moe and config.moe else _dense_ops(config, work.tokens)
    return [norms, *_attention_ops(config, config.mla, work), *block]


def experts_visited(moe: MoeConfig, tokens: int) -> float:
    """Distinct experts that `tokens` tokens are expected to visit when every expert is as likely. Real routing visits fewer."""
    return moe.num_experts * (1.0 - (1.0 - moe.num_experts_per_token / moe.num_experts) ** tokens)


def _attention_ops(config: ModelConfig, mla: MlaConfig, work: Work) -> list[Op]:
    tokens, heads, hidden = work.tokens, config.num_heads, config.hidden_size
    weight = _weight_bytes(config)
    row = mla.kv_lora_rank + mla.rope_dim
    query = heads * config.head_dim
    ops = [_gemm("query and latent projection", tokens, hidden, (mla.q_lora_rank or query) + row, weight)]
    if mla.q_lora_rank:
        ops.append(_gemm("query up-projection", tokens, mla.q_lora_rank, query, weight))
    ops.append(Op("norm, rotation, cache write", tokens * 2 * (heads * mla.rope_dim + row) * BF16_BYTES))
    if work.phase == "decode":
        ops += [_per_head("absorb W_UK", tokens, heads, mla.nope_dim, mla.kv_lora_rank), _decode_attention(mla, heads, work),
                _per_head("absorb W_UV", tokens, heads, mla.kv_lora_rank, mla.v_dim)]
    else:
        ops += [_gemm("key and value up-projection", tokens, mla.kv_lora_rank, heads * (mla.nope_dim + mla.v_dim), weight),
                _prefill_attention(mla, heads, work)]
    return [*ops, _gemm("attention output projection", tokens, heads * mla.v_dim, hidden, weight)]


def _decode_attention(mla: MlaConfig, heads: int, work: Work) -> Op:
    per_pair = 2 * mla.kv_lora_rank + mla.rope_dim  # a score over latent and rotated key, a value over the latent
    cache = work.tokens * work.context * (mla.kv_lora_rank + mla.rope_dim) * BF16_BYTES
    return Op("latent attention, decode", cache + work.tokens * heads * per_pair * BF16_BYTES,
              2.0 * work.tokens * work.context * heads * per_pair)


def _prefill_attention(mla: MlaConfig, heads: int, work: Work) -> Op:
    score, value = mla.nope_dim + mla.rope_dim, mla.v_dim
    return Op("latent attention, prefill", work.tokens * heads * 2 * (score + value) * BF16_BYTES,
              2.0 * work.tokens * (work.context / 2) * heads * (score + value))


def _moe_ops(config: ModelConfig, moe: MoeConfig, work: Work) -> list[Op]:
    tokens, hidden, inner = work.tokens, config.hidden_size, moe.intermediate_size
    weight, rate = _weight_bytes(config), _rate(config)
    visited = experts_visited(moe, tokens) if work.experts is None else work.experts
    rows = tokens * moe.num_experts_per_token
    ops = [
        _gemm("router", tokens, hidden, moe.num_experts, BF16_BYTES),
        Op("top-k and alignment", tokens * (moe.num_experts * BF16_BYTES + moe.num_experts_per_token * 16)),
        Op("experts gate and up", visited * 2 * hidden * inner * weight + tokens * hidden * weight + rows * 2 * inner * BF16_BYTES,
           2.0 * rows * hidden * 2 * inner, rate),
        Op("experts activation", rows * inner * (2 * BF16_BYTES + weight)),
        Op("experts down", visited * hidden * inner * weight + rows * (inner * weight + hidden * BF16_BYTES),
           2.0 * rows * hidden * inner, rate),
        Op("sum over experts", rows * hidden * BF16_BYTES + tokens * hidden * FP32_BYTES),
    ]
    if moe.shared_intermediate_size:
        ops += _gated("shared expert", config, tokens, moe.shared_intermediate_size)
    return ops


def _dense_ops(config: ModelConfig, tokens: int) -> list[Op]:
    return _gated("dense", config, tokens, config.intermediate_size)


def _gated(name: str, config: ModelConfig, tokens: int, inner: int) -> list[Op]:
    weight = _weight_bytes(config)
    return [_gemm(f"{name} gate and up", tokens, config.hidden_size, 2 * inner, weight),
            _gemm(f"{name} down", tokens, inner, config.hidden_size, weight)]


def _gemm(name: str, tokens: int, k: int, n: int, weight_bytes: int) -> Op:
    """Activations come in the weights' type and leave as bfloat16."""
    return Op(name, k * n * weight_bytes + tokens * (k * weight_bytes + n * BF16_BYTES), 2.0 * tokens * k * n,
              "fp8" if weight_bytes == 1 else "bf16")


def _per_head(name: str, tokens: int, heads: int, k: int, n: int) -> Op:
    """One product per head; its weights are kept in bfloat16."""
    return Op(name, heads * (k * n + tokens * (k + n)) * BF16_BYTES, 2.0 * tokens * heads * k * n)


def _weight_bytes(config: ModelConfig) -> int:
    return 1 if config.fp8_block else BF16_BYTES


def _rate(config: ModelConfig) -> Rate:
    return "fp8" if config.fp8_block else "bf16"
