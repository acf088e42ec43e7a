"""What the parallel flags mean, and which of them a model cannot honour."""

from typing import Any

import pytest

from coordinator.errors import ConfigError
from workers.batch import Agreed, ForwardBatch
from workers.model_config import ModelConfig
from workers.parallel_sizes import ParallelSizes
from workers.random_model import FP8_CONFIG, KINDS


def config_of(kind: str, *, full: bool = True, **changes: Any) -> ModelConfig:
    chosen = KINDS[kind]
    values = chosen.full | ({} if full else chosen.small) | {"torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    return ModelConfig.parse({"architectures": [chosen.architecture], "hidden_act": "silu", **values, **changes})


def test_ranks_are_numbered_group_by_group() -> None:
    sizes = ParallelSizes(tp=8, dp=2)
    assert sizes.attn_tp == 4
    assert [(sizes.dp_rank(rank), sizes.attn_tp_rank(rank)) for rank in (0, 3, 4, 7)] == [(0, 0), (0, 3), (1, 0), (1, 3)]


def test_key_value_heads_split_and_repeat_where_there_are_fewer_than_ranks() -> None:
    config = config_of("llama")  # 32 query heads, 8 of keys and values
    assert [list(ParallelSizes(tp=4).kv_heads(config, rank)) for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(ParallelSizes(tp=16).kv_heads(config, rank)) for rank in (0, 1, 2, 15)] == [[0], [0], [1], [7]]
    local = ParallelSizes(tp=16).local(config)
    assert (local.num_heads, local.num_kv_heads, local.kv_row) == (2, 1, 2 * config.head_dim)


def test_a_step_is_one_of_decodes_only_if_every_token_in_it_draws_the_next() -> None:
    """Else the rows of its logits are not those of the sequences that draw: a prompt may go on by a single token, too."""
    batch = ForwardBatch(token_ids=[5, 6, 7], positions=[3, 9, 8], slot_mapping=[3, 9, 8], query_lens=[1, 1, 1], seq_lens=[4, 10, 9],
                         page_tables=[[0], [1], [2]], logit_rows=[0, 1, 2])
    assert ParallelSizes().agreed(batch) == Agreed(3, is_decode=True)
    batch.logit_rows = [0, 2]
    assert ParallelSizes().agreed(batch) == Agreed(3, is_decode=False)


def test_a_latent_cache_is_whole_on_every_rank() -> None:
    config = config_of("deepseek-v3")
    assert ParallelSizes(tp=8).local(config).kv_row == config.kv_row
    assert ParallelSizes(tp=8).local(config).num_heads == 16


@pytest.mark.parametrize("sizes", [
    ParallelSizes(tp=8), ParallelSizes(tp=16), ParallelSizes(tp=8, dp=8, moe_mode="EP"),
    ParallelSizes(tp=16, dp=16, moe_mode="EP", prefill_overlap=True, decode_overlap=True, redundant_experts=1, rebalance_steps=1000),
])
def test_the_guides_commands_fit_the_published_model(sizes: ParallelSizes) -> None:
    sizes.validate(config_of("deepseek-v3", quantization_config=FP8_CONFIG), keeps_fp8=True)


@pytest.mark.parametrize(("kind", "sizes", "message"), [
    ("llama", ParallelSizes(tp=4, dp=3), "--dp 3 does not divide --tp 4"),
    ("qwen2", ParallelSizes(tp=8), "28 attention heads do not split over 8"),
    ("llama", ParallelSizes(tp=2, dp=2, moe_mode="EP"), "MOE_MODE=EP: LlamaForCausalLM has no experts"),
    ("deepseek-v3", ParallelSizes(moe_mode="EP"), "needs --tp of at least 2"),
    ("deepseek-v3", ParallelSizes(tp=2, moe_mode="ep"), "MOE_MODE must be one of TP, EP"),
    ("deepseek-v3", ParallelSizes(tp=32), "intermediate_size 18432 over 32 ranks cuts through FP8 blocks"),
    ("deepseek-v2-lite", ParallelSizes(tp=6, dp=6, moe_mode="EP"), "64 experts do not spread evenly over --tp 6"),
    ("deepseek-v2-lite", ParallelSizes(tp=2, prefill_overlap=True), "--enable_prefill_microbatch_overlap.*MOE_MODE is TP"),
    ("llama", ParallelSizes(decode_overlap=True), "--enable_decode_microbatch_overlap.*no experts"),
    ("llama", ParallelSizes(tp=2, dp=2, one_shot_bytes=4096), "--one_shot_all_reduce_bytes 4096"),
    ("deepseek-v2-lite", ParallelSizes(tp=2, redundant_experts=1), "--ep_redundant_experts"),
    ("deepseek-v2-lite", ParallelSizes(tp=2, moe_mode="EP", redundant_experts=33), "from 0 to 32"),
    ("deepseek-v2-lite", ParallelSizes(tp=2, moe_mode="EP", exchange="nvshmem"), "--ep_exchange must be one of"),
])
def test_what_cannot_be_honoured_is_refused_by_name(kind: str, sizes: ParallelSizes, message: str) -> None:
    changes = {"quantization_config": FP8_CONFIG} if kind == "deepseek-v3" else {}
    with pytest.raises(ConfigError, match=message):
        sizes.validate(config_of(kind, **changes), keeps_fp8=True)
