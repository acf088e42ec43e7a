"""The flags that tell an engine process which of several ranks it is; `tokenmill serve` fills them in."""

import argparse

from workers.settings import RankSettings


def add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("ranks").add_argument
    add("--tp", type=int, default=1)
    add("--dp", type=int, default=1)
    add("--moe_mode", default="TP")
    add("--rank", type=int, default=0)
    add("--local_rank", type=int, default=0, help="of those on this node: which GPU it has")
    add("--num_local", type=int, default=1, help="ranks on this node")
    add("--desk", default="", help="host:port where the ranks meet")
    add("--ep_exchange", default="auto")
    add("--ep_redundant_experts", type=int, default=0)
    add("--ep_rebalance_steps", type=int, default=0)
    add("--one_shot_all_reduce_bytes", type=int, default=0)
    add("--enable_prefill_microbatch_overlap", action="store_true")
    add("--enable_decode_microbatch_overlap", action="store_true")


def settings(flags: argparse.Namespace) -> RankSettings:
    return RankSettings(
        rank=flags.rank, local_rank=flags.local_rank, num_local=flags.num_local, desk=flags.desk, tp=flags.tp, dp=flags.dp,
        moe_mode=flags.moe_mode, ep_exchange=flags.ep_exchange, ep_redundant_experts=flags.ep_redundant_experts,
        ep_rebalance_steps=flags.ep_rebalance_steps, prefill_overlap=flags.enable_prefill_microbatch_overlap,
        one_shot_all_reduce_bytes=flags.one_shot_all_reduce_bytes, decode_overlap=flags.enable_decode_microbatch_overlap)
