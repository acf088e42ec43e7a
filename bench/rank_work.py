"""What one rank of a group computes and says in a step: bench.roofline's operations, cut as workers/parallel_sizes.py cuts the model."""

from dataclasses import dataclass, replace

from bench.links import Links
from bench.roofline import BF16_BYTES, Op, Work, experts_visited, layer_ops, step_ops
from workers.model_config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """`tp` ranks in `dp` groups; with `is_ep` whole experts are spread over all of them, else every expert over its group."""

    tp: int = 1
    dp: int = 1
    is_ep: bool = False

    @property
    def attn_tp(self) -> int:
        return self.tp // self.dp

    @property
    def name(self) -> str:
        return f"tp {self.tp}" + (f", dp {self.dp}" if self.dp > 1 else "") + (", EP" if self.is_ep else "")


def rank_config(config: ModelConfig, split: Split) -> ModelConfig:
    """The model with the sizes that one rank computes. Latents and their down-projection are whole on every rank."""
    cut, moe = split.attn_tp, config.moe
    if moe is not None:
        expert_cut = 1 if split.is_ep else cut
        moe = replace(moe, intermediate_size=moe.intermediate_size // expert_cut,
                      shared_intermediate_size=moe.shared_intermediate_size // cut)
    return replace(config, num_heads=config.num_heads // cut, num_kv_heads=max(config.num_kv_heads // cut, 1), moe=moe,
                   intermediate_size=config.intermediate_size // cut, vocab_size=config.vocab_size // cut)


def rank_ops(config: ModelConfig, split: Split, work: Work) -> list[Op]:
    """`work`: of one dp group. With experts spread, all groups are taken to be as busy, and all experts as likely."""
    own = rank_config(config, split)
    if not split.is_ep or config.moe is None:
        return step_ops(own, work)
    everybody = work.tokens * split.dp
    visited = experts_visited(config.moe, everybody) if work.experts is None else work.experts
    share = replace(work, tokens=max(1, everybody // split.tp), experts=visited / split.tp)
    ops = step_ops(own, work)[-1:]
    for layer in range(config.num_layers):
        here, spread = layer_ops(own, work, layer), layer_ops(own, share, layer)
        ops += [other if "experts" in op.name else op for op, other in zip(here, spread, strict=True)]
    return ops


def talk_s(config: ModelConfig, split: Split, work: Work, links: Links) -> float:
    """One after the other, nothing hidden behind computation: two sums over the group per layer, or the tokens' way to experts and back."""
    row = config.hidden_size * BF16_BYTES
    sums = links.all_reduce(work.tokens * row, split.attn_tp)
    seconds = config.num_layers * 2 * sums + links.all_gather(work.logit_rows * config.vocab_size * BF16_BYTES, split.attn_tp)
    if split.is_ep and config.moe is not None:
        num_moe = config.num_layers - config.moe.first_layer
        sent = work.tokens / split.attn_tp * config.moe.num_experts_per_token * row
        seconds += num_moe * (2 * links.exchange(sent, split.tp) - sums)  # which replace the sum behind the experts
    return seconds


def weight_bytes(config: ModelConfig, split: Split) -> float:
    """What one rank keeps of the weights, about: those of one token that visits every expert of this rank, and the embeddings."""
    if config.moe is None:
        experts = 0.0
    else:
        experts = config.moe.num_experts / (split.tp if split.is_ep else 1)
    own = rank_config(config, split)
    ops = step_ops(own, Work(phase="decode", tokens=1, context=1, logit_rows=1, experts=experts or None))
    return sum(op.num_bytes for op in ops) + own.vocab_size * config.hidden_size * BF16_BYTES
