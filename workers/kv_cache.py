"""The paged KV pool of one rank: one tensor for all layers, in memory that another process can map to copy pages out of it.

    gqa   [num_layers, 2, num_slots, kv_heads, head_dim]      keys, then values, of this rank's heads
    mla   [num_layers, num_slots, kv_lora_rank + rope_dim]    one latent for all heads, whole on every rank

A page is `page_size` slots in a row; slot = page id * page_size + offset. What the pages mean is the page pool's business.
"""

import logging
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coordinator.errors import ConfigError, LayoutMismatch, Unavailable
from coordinator.messages import KVLayout
from workers import cuda_ipc
from workers.model_config import ModelConfig
from workers.transfer.plan import heads_of

log = logging.getLogger(__name__)


class HeadRun(NamedTuple):
    """Some heads in a row, and the first of them in the pool that is read and in the one that is written."""

    source: int
    target: int
    num_heads: int


class KVCache:
    """This process's pool (`create`) or a read-only view of another's (`attach`). It lives as long as a reference to it."""

    def __init__(self, flat: Tensor, layout: KVLayout, num_pages: int, address: str, fd: int) -> None:
        self.num_pages = num_pages
        self.page_size = layout.page_size
        self.address = address                     # "" where the pool cannot be mapped by others
        self._layout = layout
        self._flat = flat                          # [layers or layers * 2, num_slots, elements]
        self._fd = fd
        self.layers: list[Tensor] = []             # per layer, as the model reads it; empty for an attached pool

    @classmethod
    def create(cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device,
               weights: str = "", *, tp_size: int = 1, whole: ModelConfig | None = None) -> "KVCache":
        """A zeroed pool. `weights` is `loader.weights_hash` of the model, for the layout. Raises ConfigError if memory is short.

        `config` has the heads of this rank, one of `tp_size`; `whole` those of the model, if that is more.
        """
        whole = whole or config
        layout = KVLayout(model="", weights=weights, kind=config.kv_kind, num_layers=config.num_layers, row=whole.kv_row,
                          dtype=str(dtype).removeprefix("torch."), page_size=page_size, tp_size=tp_size,
                          num_kv_heads=1 if config.mla else whole.num_kv_heads)
        shape = _flat_shape(layout, num_pages)
        if device.type == "cpu":
            flat, fd = _shared_tensor(shape, dtype)
            cache = cls(flat, layout, num_pages, f"/proc/{os.getpid()}/fd/{fd}", fd)
        else:
            flat, address = _device_tensor(shape, dtype, device)
            cache = cls(flat, layout, num_pages, address, -1)
        slots = num_pages * page_size
        tail = (slots, config.kv_row) if config.mla else (2, slots, config.num_kv_heads, config.head_dim)
        cache.layers = list(cache._flat.view(config.num_layers, *tail))
        return cache

    @classmethod
    def attach(cls, address: str, num_pages: int, layout: KVLayout) -> "KVCache":
        """Map the pool of another process of this host, as `address`, `num_pages` and `layout` describe it; pages are copied from it.

        The mapping stays valid when that process dies. Raises Unavailable if the pool is not there (any more) or not readable,
        LayoutMismatch if its size is not what the layout says.
        """
        shape = _flat_shape(layout, num_pages)
        dtype = _torch_dtype(layout)
        size = dtype.itemsize * shape[0] * shape[1] * shape[2]
        if cuda_ipc.is_address(address):
            data = cuda_ipc.attach(address)
            if data.numel() != size:
                raise LayoutMismatch("bytes of the pool", size, data.numel())
            return cls(data.view(dtype).view(shape), layout, num_pages, address, -1)
        try:
            fd = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"KV pool {address}: {error.strerror}") from None
        try:
            actual = os.fstat(fd).st_size
            if actual != size:
                raise LayoutMismatch("bytes of the pool", size, actual)
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        with warnings.catch_warnings():  # torch warns that the memory is read-only; so it shall be, and nothing here writes to it
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(memory, dtype=dtype).view(shape)
        return cls(flat, layout, num_pages, address, -1)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def device(self) -> torch.device:
        return self._flat.device

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        return self._flat.shape[0] * self._flat.shape[2] * self._flat.itemsize

    @property
    def flat(self) -> Tensor:
        """[planes, num_slots, elements]: a plane is a layer's latents, or its keys, or its values."""
        return self._flat

    @property
    def num_heads(self) -> int:
        """Of keys and values in this pool; a latent counts as one."""
        return len(heads_of(self._layout.num_kv_heads, self._layout.tp_size, 0))

    @property
    def head_width(self) -> int:
        """Elements that one head has in a plane."""
        return self._flat.shape[2] // self.num_heads

    def layout(self, model_name: str) -> KVLayout:
        """What another process's pool must agree with before pages move between the two."""
        return replace(self._layout, model=model_name)

    def copy_pages_from(self, other: "KVCache", src_pages: Sequence[int], dst_pages: Sequence[int], num_tokens: int,
                        heads: HeadRun | None = None) -> None:
        """Copy the first `num_tokens` tokens held by `src_pages` of `other` into `dst_pages` of this pool, for all layers.

        Both lists are in token order and hold enough pages. Pages that follow each other on both sides move in one copy. Between
        two pools on GPUs whole pages are copied, on the current stream, in one launch if all heads are; nothing here waits for it.
        `heads`: only these, between pools of groups that are split differently. Raises LayoutMismatch if the pools differ in more
        than their number of pages and ranks, ValueError for a page or a head that does not exist.
        """
        check_same_layout(self._layout, replace(other._layout, model=self._layout.model))
        size = self.page_size
        num_pages = -(-num_tokens // size)
        if min(len(src_pages), len(dst_pages)) < num_pages:
            raise ValueError(f"{num_tokens} tokens need {num_pages} pages, got {len(src_pages)} and {len(dst_pages)}")
        src_pages, dst_pages = src_pages[:num_pages], dst_pages[:num_pages]
        other.check_pages(src_pages)
        self.check_pages(dst_pages)
        if heads is None and self._flat.shape[2] != other._flat.shape[2]:
            raise ValueError("these pools hold different heads: say which")
        src_columns, dst_columns = (slice(None), slice(None)) if heads is None else (
            other.columns(heads.source, heads.num_heads), self.columns(heads.target, heads.num_heads))
        if self._flat.is_cuda and other._flat.is_cuda:
            if heads is None or (src_columns == dst_columns == self.columns(0, None) == other.columns(0, None)):
                self._launch_copy(other, src_pages, dst_pages)
            else:
                self._copy_heads(other, src_pages, dst_pages, src_columns, dst_columns)
            return
        first = 0
        for i in range(1, num_pages + 1):
            if i < num_pages and src_pages[i] == src_pages[i - 1] + 1 and dst_pages[i] == dst_pages[i - 1] + 1:
                continue
            count = min(i * size, num_tokens) - first * size
            src_slot, dst_slot = src_pages[first] * size, dst_pages[first] * size
            self._flat[:, dst_slot : dst_slot + count, dst_columns].copy_(other._flat[:, src_slot : src_slot + count, src_columns])
            first = i

    def check_pages(self, pages: Sequence[int]) -> None:
        """Raises ValueError if one of them does not exist."""
        if len(pages) and not 0 <= min(pages) <= max(pages) < self.num_pages:
            raise ValueError(f"a page outside of the pool of {self.num_pages}")

    def columns(self, first_head: int, num_heads: int | None) -> slice:
        """Where these heads of this pool stand in a row of a plane; None: all from there. Raises ValueError if they do not exist."""
        width, row = self.head_width, self._flat.shape[2]
        stop = row if num_heads is None else (first_head + num_heads) * width
        if not 0 <= first_head * width < stop <= row:
            raise ValueError(f"heads {first_head} to {stop // width} of a pool that has {row // width}")
        return slice(first_head * width, stop)

    def _copy_heads(self, other: "KVCache", src_pages: Sequence[int], dst_pages: Sequence[int], src_columns: slice,
                    dst_columns: slice) -> None:
        """Whole pages into memory of this GPU, which alone runs kernels here, then the heads into their places."""
        from kernels.page_copy import gather_pages

        size, count = self.page_size, len(src_pages)
        pages = _on_device([src_pages, dst_pages], self.device)
        packed = torch.empty(self._flat.shape[0], count * size, other._flat.shape[2], dtype=self._flat.dtype, device=self.device)
        gather_pages(other._flat, pages[0], size, packed)
        by_page = self._flat.unflatten(1, (-1, size))[..., dst_columns]
        by_page.index_copy_(1, pages[1].long(), packed.unflatten(1, (count, size))[..., src_columns])

    def _launch_copy(self, other: "KVCache", src_pages: Sequence[int], dst_pages: Sequence[int]) -> None:
        from kernels.page_copy import FROM_A_PEER, copy_pages  # Triton, which only a GPU needs

        pages = _on_device([src_pages, dst_pages], self.device)
        copy_pages(other._flat, self._flat, pages[0], pages[1], self.page_size,
                   config=FROM_A_PEER if other.device != self.device else None)


def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers."""
    return config.num_layers * config.kv_row * page_size * dtype.itemsize


def check_same_layout(ours: KVLayout, theirs: KVLayout) -> None:
    """Raises LayoutMismatch naming the first field that differs. The number of ranks may: heads are split anew on the way."""
    for field in fields(KVLayout):
        if field.name == "tp_size":
            continue
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            raise LayoutMismatch(field.name, mine, other)


def _flat_shape(layout: KVLayout, num_pages: int) -> tuple[int, int, int]:
    """[layers and, for gqa, keys and values apart; slots; elements]"""
    planes = 1 if layout.kind == "mla" else 2
    elements = layout.row // planes // layout.num_kv_heads * len(heads_of(layout.num_kv_heads, layout.tp_size, 0))
    return layout.num_layers * planes, num_pages * layout.page_size, elements


def _on_device(pages: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of pages, by numpy: it reads lists several times faster than torch."""
    return torch.from_numpy(np.asarray(pages, dtype=np.int32)).pin_memory().to(device, non_blocking=True)


def _torch_dtype(layout: KVLayout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise LayoutMismatch("dtype", "a torch dtype", layout.dtype)
    return dtype


def _device_tensor(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, str]:
    """A zeroed pool in a GPU's memory and its address; without one where the machine lets no process map another's memory."""
    try:
        data, address = cuda_ipc.allocate(dtype.itemsize * shape[0] * shape[1] * shape[2], device)
    except Unavailable as error:
        log.warning("no other process can copy KV pages from this one: %s", error)
        return torch.zeros(shape, dtype=dtype, device=device), ""
    return data.view(dtype).view(shape), address


def _shared_tensor(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Zeroed memory under a file descriptor: another process opens /proc/<pid>/fd/<fd>. Pages of it are taken when first written."""
    size = dtype.itemsize * shape[0] * shape[1] * shape[2]
    fd = os.memfd_create("tokenmill-kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise ConfigError(f"cannot map {size / 1e9:.1f} GB for the KV pool ({error}): lower --max_total_token_num") from None
    return torch.frombuffer(memory, dtype=dtype).view(shape), fd
