"""Which ranks run on which node, and who leads whom: arithmetic on the flags, before anything starts. Knows neither models nor devices.

    --tp 8 --dp 2 --nnodes 2        node 0             node 1
    rank                            0  1  2  3         4  5  6  7
    dp group                        0 (0 leads)        1 (4 leads)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.errors import ConfigError

MOE_MODES = ("TP", "EP")
TOKEN_VARIABLE = "TOKENMILL_GROUP_TOKEN"       # what ranks show at the desk; in the environment, where `ps` does not tell it
DEFAULT_PORT = 28765


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """Raises ConfigError, naming the flag, for numbers that do not go together. On one rank all experts are here in either MoE mode."""

    tp: int = 1
    dp: int = 1
    moe_mode: str = "TP"
    nnodes: int = 1
    node_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "nnodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.moe_mode not in MOE_MODES:
            raise ConfigError(f"MOE_MODE={self.moe_mode}: must be TP or EP")
        if self.tp % self.dp:
            raise ConfigError(f"--tp {self.tp} --dp {self.dp}: --tp counts all ranks, so --dp must divide it")
        if self.tp % self.nnodes:
            raise ConfigError(f"--tp {self.tp} --nnodes {self.nnodes}: --tp counts the ranks of all nodes, each has as many: "
                              "--nnodes must divide it")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node_rank {self.node_rank}: with --nnodes {self.nnodes} it must be from 0 to {self.nnodes - 1}")

    @property
    def is_one_rank(self) -> bool:
        return self.tp == 1

    @property
    def ranks_per_dp_group(self) -> int:
        return self.tp // self.dp

    @property
    def ranks_per_node(self) -> int:
        return self.tp // self.nnodes

    @property
    def local_ranks(self) -> range:
        """Of this node, in order; the n-th of them has the n-th GPU."""
        return range(self.node_rank * self.ranks_per_node, (self.node_rank + 1) * self.ranks_per_node)

    def dp_rank(self, rank: int) -> int:
        return rank // self.ranks_per_dp_group

    def is_leader(self, rank: int) -> bool:
        """Leaders pull jobs and schedule; the other ranks of their dp group follow them."""
        return rank % self.ranks_per_dp_group == 0


def moe_mode(environment: Mapping[str, str] = os.environ) -> str:
    return environment.get("MOE_MODE", "TP")
