"""Exchanges by DeepSeek's DeepEP, where it is installed: NVLink and RDMA kernels in place of collectives, for steps with prompts.

Steps of decodes keep the padded exchange, which CUDA graphs can hold; DeepEP's low-latency kernels are not used here.
Written after DeepEP's documented interface (its v1 `Buffer`).
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from coordinator.errors import ConfigError
from workers.model.exchange import Arrived, Exchange, PaddedSent, Sent
from workers.parallel import RankGroup

PACKAGE = "deep_ep"
_buffers: dict[int, Any] = {}  # by rows' bytes: one for all layers


def make(ranks: RankGroup, slots_per_rank: int, hidden_size: int) -> Any:
    """Raises ConfigError if the package or a GPU is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(f"--ep_exchange deepep: the package {PACKAGE} is not installed; use auto, exact or padded")
    if not torch.cuda.is_available():
        raise ConfigError("--ep_exchange deepep: DeepEP needs CUDA GPUs; use auto, exact or padded")
    buffer = _buffer(ranks, hidden_size)

    def choose(capacity: int) -> Exchange:
        def exchange(x: Tensor, slots: Tensor, weights: Tensor) -> Sent:
            if capacity:
                return PaddedSent(ranks, slots_per_rank, capacity, x, slots, weights)
            return DeepEpSent(buffer, slots_per_rank * ranks.size, x, slots, weights)

        return exchange

    return choose


class DeepEpSent:
    def __init__(self, buffer: Any, num_slots: int, x: Tensor, slots: Tensor, weights: Tensor) -> None:
        self._buffer = buffer
        wide = slots.long()
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(wide, num_slots)
        self._x, self._slots, self._weights, _, self._handle, self._event = buffer.dispatch(
            x, topk_idx=wide, topk_weights=weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank, num_tokens_per_expert=per_expert, async_finish=True)

    def arrived(self) -> Arrived:
        self._event.current_stream_wait()
        return Arrived(self._x, self._slots.int(), self._weights, is_sparse=True)

    def send_back(self, x: Tensor) -> None:
        self._out, _, self._event = self._buffer.combine(x, self._handle, async_finish=True)

    def returned(self) -> Tensor:
        self._event.current_stream_wait()
        out: Tensor = self._out
        return out


def _buffer(ranks: RankGroup, hidden_size: int) -> Any:
    row_bytes = hidden_size * 2
    if row_bytes not in _buffers:
        kind = getattr(importlib.import_module(PACKAGE), "Buffer", None)
        if kind is None:
            raise ConfigError(f"--ep_exchange deepep: this version of {PACKAGE} has no Buffer; use auto, exact or padded")
        configs = [kind.get_dispatch_config(ranks.size), kind.get_combine_config(ranks.size)]
        nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks.size) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row_bytes, ranks.size) for config in configs)
        _buffers[row_bytes] = kind(ranks.group, nvlink, rdma)
    return _buffers[row_bytes]
