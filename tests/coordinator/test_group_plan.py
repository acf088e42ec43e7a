"""Ranks are spread evenly over nodes, in order; numbers that do not go together are refused by the flag's name."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coordinator import serve_flags, serve_ranks
from coordinator.errors import ConfigError
from coordinator.group_plan import GroupPlan


def test_every_rank_is_on_one_node_and_each_dp_group_has_one_leader() -> None:
    nodes = [GroupPlan(tp=16, dp=4, moe_mode="EP", nnodes=2, node_rank=node) for node in range(2)]
    assert [list(node.local_ranks) for node in nodes] == [list(range(8)), list(range(8, 16))]
    assert [rank for node in nodes for rank in node.local_ranks if node.is_leader(rank)] == [0, 4, 8, 12]
    assert [nodes[0].dp_rank(rank) for rank in (0, 3, 4, 15)] == [0, 0, 1, 3]


@pytest.mark.parametrize(("sizes", "text"), [
    ({"tp": 0}, "--tp must be at least 1"), ({"tp": 4, "dp": 3}, "--tp 4 --dp 3"), ({"tp": 2, "dp": 4}, "--tp 2 --dp 4"),
    ({"tp": 3, "nnodes": 2}, "--tp 3 --nnodes 2"), ({"tp": 2, "nnodes": 2, "node_rank": 2}, "--node_rank 2.*from 0 to 1"),
    ({"tp": 2, "node_rank": -1}, "--node_rank -1"), ({"node_rank": 1}, "--node_rank 1"), ({"tp": 2, "moe_mode": "ep"}, "MOE_MODE=ep"),
])
def test_numbers_that_do_not_go_together_are_refused_by_flag(sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        GroupPlan(**sizes)


@pytest.mark.parametrize(("flags", "environment", "text"), [
    (["--enable_prefill_microbatch_overlap"], {}, "--enable_prefill_microbatch_overlap.*nothing to overlap"),
    (["--run_mode", "pd_master", "--tp", "2"], {}, "pd_master computes nothing"),
    (["--tp", "2", "--nnodes", "2", "--nccl_host", "10.0.0.1"], {}, "--nccl_host 10.0.0.1: not a loopback address"),
    ([], {"MOE_MODE": "XP"}, "MOE_MODE=XP"),
    (["--run_mode", "decode", "--tp", "4", "--nnodes", "2", "--kv_transfer", "mapped", "--config_server_host", "127.0.0.1"], {},
     "--kv_transfer mapped: dp groups of 4 ranks over nodes of 2"),
])
def test_serve_refuses_what_several_ranks_cannot_honour(tmp_path: Path, flags: list[str], environment: dict[str, str], text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=text):
        serve_flags.parse(["--model_dir", str(tmp_path), *flags], environment)


def test_a_node_starts_one_process_per_rank_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    flags = serve_flags.parse(["--model_dir", str(tmp_path), "--tp", "8", "--dp", "4", "--nnodes", "2", "--node_rank", "1",
                               "--worker_id", "w"], {})
    started = serve_ranks.processes(flags, "both", [], "127.0.0.1:1")
    assert [module for _, module, _ in started] == ["workers.worker", "workers.follower"] * 2
    values = [dict(pairwise(args)) for _, _, args in started]
    assert [(v["--rank"], v["--local_rank"], v["--num_local"]) for v in values] == [("4", "0", "4"), ("5", "1", "4"), ("6", "2", "4"),
                                                                                     ("7", "3", "4")]
    assert [v.get("--worker_id") for v in values] == ["w-2", None, "w-3", None]
