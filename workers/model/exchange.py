"""Tokens travel to the ranks that have their experts, and what the experts made of them travels back and is summed.

    exact    a token goes once to each rank that has experts of it. How many go where is told first, which the host must wait for:
             for prompts, and wherever ranks know nothing of each other's batches.
    padded   every rank has the same room for the rows of every other, `capacity` each. No size is told and the host never waits, so it
             can be part of a CUDA graph. As any row may be wanted by any rank, such an all-to-all is an all-gather: the rows are
             not copied for each rank.
    deepep   DeepSeek's library, see `deepep`.

A route tells slots, numbered over all ranks (`expert_placement`); -1 is no expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.parallel import RankGroup, Work


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows of all ranks that want experts of this one. `is_sparse`: choices of -1 are many, and the host may count the others."""

    x: Tensor        # [M, D]
    slots: Tensor    # [M, k] int32, numbered from this rank's first; -1: none of this rank's
    weights: Tensor  # [M, k] float32
    is_sparse: bool


class Sent(Protocol):
    """One travel there and back. The methods are called once each, in this order, and in the same order on all ranks."""

    def arrived(self) -> Arrived:
        """Waits."""
        ...

    def send_back(self, x: Tensor) -> None:
        """x [M, D]: what the experts made of each arrived row, summed over this rank's. Does not wait."""
        ...

    def returned(self) -> Tensor:
        """Waits. [T, D]: the sum over all ranks."""
        ...


Exchange = Callable[[Tensor, Tensor, Tensor], Sent]  # x [T, D], slots [T, k] int32, weights [T, k] float32: sent, not waited for


class ExactSent:
    def __init__(self, ranks: RankGroup, slots_per_rank: int, x: Tensor, slots: Tensor, weights: Tensor) -> None:
        self._ranks, self._x = ranks, x
        numbers = torch.arange(ranks.size, dtype=slots.dtype, device=slots.device)
        owners = slots.div(slots_per_rank, rounding_mode="floor")
        goes = (owners.unsqueeze(2) == numbers).any(1)                                   # [T, ranks]
        rank_ids, self._token_ids = goes.t().nonzero().unbind(1)
        counts = goes.sum(0)
        told, work = ranks.start_all_to_all(counts)
        local = torch.where(owners[self._token_ids] == rank_ids.unsqueeze(1), slots[self._token_ids] % slots_per_rank, -1)
        choices = _pack(local, weights[self._token_ids])
        work.wait()
        self._sent, self._received = torch.stack((counts, told)).tolist()
        self._travelling = (ranks.start_all_to_all(x[self._token_ids], self._sent, self._received),
                            ranks.start_all_to_all(choices, self._sent, self._received))
        self._returning: tuple[Tensor, Work] | None = None

    def arrived(self) -> Arrived:
        (x, work), (choices, other) = self._travelling
        work.wait()
        other.wait()
        return Arrived(x, *_unpack(choices), is_sparse=True)

    def send_back(self, x: Tensor) -> None:
        self._returning = self._ranks.start_all_to_all(x, self._received, self._sent)

    def returned(self) -> Tensor:
        assert self._returning is not None
        x, work = self._returning
        work.wait()
        out = torch.zeros(self._x.shape, dtype=torch.float32, device=x.device)
        for token_ids, rows in zip(self._token_ids.split(self._sent), x.split(self._sent), strict=True):
            out.index_add_(0, token_ids, rows.float())  # rank by rank, so that sums have one order: a token is there once
        return out.to(self._x.dtype)


class PaddedSent:
    def __init__(self, ranks: RankGroup, slots_per_rank: int, capacity: int, x: Tensor, slots: Tensor, weights: Tensor) -> None:
        assert x.shape[0] <= capacity
        self._ranks, self._slots_per_rank, self._num_rows = ranks, slots_per_rank, x.shape[0]
        missing = capacity - x.shape[0]
        choices = _pack(F.pad(slots, (0, 0, 0, missing), value=-1), F.pad(weights, (0, 0, 0, missing)))
        self._travelling = ranks.start_all_gather(F.pad(x, (0, 0, 0, missing))), ranks.start_all_gather(choices)
        self._returning: tuple[Tensor, Work] | None = None

    def arrived(self) -> Arrived:
        (x, work), (choices, other) = self._travelling
        work.wait()
        other.wait()
        slots, weights = _unpack(choices.flatten(0, 1))
        local = slots - self._ranks.rank * self._slots_per_rank
        is_here = (local >= 0) & (local < self._slots_per_rank)
        return Arrived(x.flatten(0, 1), torch.where(is_here, local, -1), weights, is_sparse=False)

    def send_back(self, x: Tensor) -> None:
        self._returning = self._ranks.start_all_to_all(x)

    def returned(self) -> Tensor:
        assert self._returning is not None
        x, work = self._returning
        work.wait()
        by_rank: Tensor = x.unflatten(0, (self._ranks.size, -1))
        return by_rank[:, : self._num_rows].sum(0, dtype=torch.float32).to(x.dtype)


def _pack(slots: Tensor, weights: Tensor) -> Tensor:
    """[N, k] int32 and [N, k] float32 -> [N, 2k] int32, to travel as one"""
    return torch.cat((slots, weights.view(torch.int32)), 1)


def _unpack(choices: Tensor) -> tuple[Tensor, Tensor]:
    slots, weights = choices.chunk(2, 1)
    return slots.contiguous(), weights.contiguous().view(torch.float32)
