"""Weights from safetensors files: checked against what the model needs, converted on the way, read by several threads.

Files are mapped, so a tensor, or the part of one outside of a rank's `Cut`, that nobody asks for is never read. Every name in the
checkpoint must be used, left to other ranks or known to carry nothing for us; every name that the model needs must be there in its
shape.
"""

import hashlib
import json
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coordinator.errors import ConfigError
from kernels.block_fp8 import BLOCK, BlockFp8
from workers.cut import Cut
from workers.model_config import ModelConfig

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FP8_ROWS = 16                          # fp8 kernels take multiples of it
SCALE_SUFFIX = "_scale_inv"            # beside each fp8 weight: float32 scales, one per block
MAX_HEADER_BYTES = 100 * 1024 * 1024   # the format's own limit
HASHED_SAMPLES, HASHED_BYTES = 64, 4096  # evenly spaced in each weight file
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}

Progress = Callable[[int, int], None]  # (loaded bytes, total bytes)
Cuts = Sequence[Cut | None]            # what is read of each of several tensors; empty: all of all
_Item = TypeVar("_Item")
_Built = TypeVar("_Built")


class Stored(NamedTuple):
    """One tensor as a file's header tells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = DTYPE_BYTES.get(self.dtype, 0)
        for size in self.shape:
            count *= size
        return count


class Checkpoint:
    """The weights of `model_dir`, handed out as tensors of `dtype` on `device`. Safe to use from many threads.

    `keeps_fp8`: fp8 weights are handed out as they are stored where a caller can take them so; None: on GPUs.
    Shapes are those of what is handed out: where a cut goes with a tensor, the stored one is larger along the cut's dimension.
    Raises ConfigError: from the constructor for files that are missing, cut off or not safetensors, from the reading methods for
    tensors that are missing or of another shape, from `finish` for tensors that nobody read or left.
    """

    def __init__(self, model_dir: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device,
                 progress: Progress | None = None, *, keeps_fp8: bool | None = None) -> None:
        self.dtype = dtype
        self.device = device
        self.keeps_fp8 = (device.type == "cuda" if keeps_fp8 is None else keeps_fp8) and config.fp8_block == (BLOCK, BLOCK)
        self._started_at = time.monotonic()
        self._dir = model_dir
        self._fp8_block = config.fp8_block
        self._stored = {name: stored for name, stored in _stored_tensors(model_dir).items() if not _carries_nothing(name, config)}
        self._unread = set(self._stored)
        self._total_bytes = sum(stored.num_bytes for stored in self._stored.values())
        self._loaded_bytes = 0
        self._progress = progress or (lambda loaded, total: None)
        self._handles: dict[Path, Any] = {}
        self._lock = threading.Lock()

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None, cut: Cut | None = None) -> Tensor:
        """The tensor `name`, or a part of it, in `shape`."""
        return self.stacked([name], list(shape), dtype=dtype, cuts=[cut])

    def stacked(self, names: Sequence[str], shape: list[int], *, rows: Sequence[int] | None = None, dtype: torch.dtype | None = None,
                cuts: Cuts = ()) -> Tensor:
        """Several tensors one below the other in one of `shape`; `rows` tells how the first dimension is split among them."""
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        for name, part, cut in zip(names, out.split_with_sizes(list(rows or shape[:1])), cuts or [None] * len(names), strict=True):
            self.fill(part, name, cut)
        return out

    def linear(self, names: Sequence[str], shape: list[int], *, rows: Sequence[int] | None = None, cuts: Cuts = ()) -> Tensor | BlockFp8:
        """As `stacked`, for a matrix that may stay in fp8."""
        parts = list(rows or shape[:1])
        if not self._stays_fp8(names, parts, shape[-1], cuts or [None] * len(names)):
            return self.stacked(names, shape, rows=parts, cuts=cuts)
        out = self._empty_fp8(shape)
        self._fill_fp8(out.data, out.scale, names, parts, cuts or [None] * len(names))
        return out

    def linears(self, names: Sequence[Sequence[str]], shape: list[int], *, rows: Sequence[int] | None = None,
                cuts: Cuts = ()) -> Tensor | BlockFp8:
        """Matrices [B, N, K] of one shape, the names of each one's parts in `names`; `cuts` are those of each one's parts."""
        parts = list(rows or shape[1:2])
        cuts = cuts or [None] * len(parts)
        if not self._stays_fp8([name for matrix in names for name in matrix], parts * len(names), shape[-1], [*cuts] * len(names)):
            whole = torch.empty(shape, dtype=self.dtype, device=self.device)
            for matrix, of_matrix in zip(whole, names, strict=True):
                for name, part, cut in zip(of_matrix, matrix.split_with_sizes(parts), cuts, strict=True):
                    self.fill(part, name, cut)
            return whole
        out = self._empty_fp8(shape)
        for data, scale, of_matrix in zip(out.data, out.scale, names, strict=True):
            self._fill_fp8(data, scale, of_matrix, parts, cuts)
        return out

    def fill(self, out: Tensor, name: str, cut: Cut | None = None) -> None:
        """Copy the tensor `name`, or a part of it, into `out`."""
        stored = self._expected(name, out.shape, cut)
        if stored.dtype == "F8_E4M3":
            out.copy_(self._dequantized(name, stored, out.shape, cut))
        elif stored.dtype in DTYPE_BYTES:
            out.copy_(_part(self._mapped(name, stored), out.shape, cut))
        else:
            raise ConfigError(f"{stored.file}: tensor {name} is of type {stored.dtype}, supported are {', '.join(DTYPE_BYTES)}")
        self._count(name, stored, out.numel() * DTYPE_BYTES[stored.dtype])

    def leave(self, prefix: str) -> None:
        """Tensors whose names start so belong to other ranks: they are not read here. Raises ConfigError if there are none."""
        names = [name for name in self._stored if name.startswith(prefix)]
        if not names:
            raise ConfigError(f"{self._dir}: tensors {prefix}… are missing")
        for name in names:
            self._count(name, self._stored[name], 0)

    def build(self, make: Callable[[_Item], _Built], items: Iterable[_Item], num_threads: int) -> list[_Built]:
        """[make(item) for item in items] with `num_threads` threads; the first error cancels the rest."""
        pool = ThreadPoolExecutor(max_workers=max(1, num_threads), thread_name_prefix="load")
        try:
            return list(pool.map(make, items))
        finally:
            pool.shutdown(cancel_futures=True)

    def finish(self) -> None:
        """Check that everything was used, and unmap the files."""
        self._handles.clear()
        size, seconds = self._loaded_bytes / 1e9, time.monotonic() - self._started_at
        logger.info("read %.2f GB in %.1f s (%.2f GB/s)", size, seconds, size / max(seconds, 1e-9))
        if self._unread:
            names = sorted(self._unread)
            raise ConfigError(f"{self._dir}: {len(names)} tensors that the model does not know, the first: {', '.join(names[:3])}")

    def _mapped(self, name: str, stored: Stored) -> Tensor:
        with self._lock:
            handle = self._handles.get(stored.file)
            if handle is None:
                handle = self._handles[stored.file] = safe_open(stored.file, framework="pt", device="cpu")
            tensor: Tensor = handle.get_tensor(name)  # a view of the mapped file: no bytes are read yet
            return tensor

    def _expected(self, name: str, shape: Sequence[int], cut: Cut | None = None) -> Stored:
        """What is stored as `name`: of that shape, or longer where it is cut."""
        stored = self._stored.get(name)
        if stored is None:
            raise ConfigError(f"{self._dir}: tensor {name} is missing")
        expected = list(shape)
        if cut is not None:
            assert 0 <= cut.start <= cut.start + expected[cut.dim] <= cut.whole
            expected[cut.dim] = cut.whole
        if stored.shape != tuple(expected):
            raise ConfigError(f"{stored.file}: tensor {name} has shape {list(stored.shape)}, the model needs {expected}")
        return stored

    def _stays_fp8(self, names: Sequence[str], rows: Sequence[int], columns: int, cuts: Cuts) -> bool:
        """Whether all parts are fp8 and their blocks fit kernels: whole ones in every row and in every part that another follows.

        Raises ConfigError where only the cut is to blame that they do not: FP8 weights would silently take twice their memory.
        """
        if not self.keeps_fp8 or not all(name in self._stored and self._stored[name].dtype == "F8_E4M3" for name in names):
            return False
        if _fits_blocks(rows, columns) and all(cut is None or cut.start % BLOCK == 0 for cut in cuts):
            return True
        stored = [self._stored[name].shape for name in names]
        if _fits_blocks([shape[0] for shape in stored], stored[0][-1]):
            raise ConfigError(f"{self._dir}: a rank's part of {names[0]} is not made of whole FP8 blocks of {BLOCK}: use a smaller --tp, "
                              "or for experts MOE_MODE=EP")
        return False

    def _empty_fp8(self, shape: list[int]) -> BlockFp8:
        *batch, rows, columns = shape
        return BlockFp8(torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device),
                        torch.empty([*batch, -(-rows // BLOCK), -(-columns // BLOCK)], dtype=torch.float32, device=self.device))

    def _fill_fp8(self, data: Tensor, scale: Tensor, names: Sequence[str], rows: list[int], cuts: Cuts) -> None:
        """Copy e4m3 numbers and their scales as they are; the parts' rows follow each other."""
        by_part = data.split_with_sizes(rows), scale.split_with_sizes([-(-count // BLOCK) for count in rows])
        for name, numbers, scales, cut in zip(names, *by_part, cuts, strict=True):
            stored = self._expected(name, numbers.shape, cut)
            of_blocks = None if cut is None else Cut(cut.dim, cut.start // BLOCK, -(-cut.whole // BLOCK))
            scales.copy_(_part(self._block_scales(name, stored), scales.shape, of_blocks))
            numbers.copy_(_part(self._mapped(name, stored), numbers.shape, cut))
            self._count(name, stored, numbers.numel())

    def _dequantized(self, name: str, stored: Stored, shape: Sequence[int], cut: Cut | None) -> Tensor:
        """e4m3 values times the scale of their block. A cut may start and end inside of blocks."""
        scale = self._block_scales(name, stored).float()
        for dim, (size, block) in enumerate(zip(shape, self._fp8_block or (BLOCK, BLOCK), strict=True)):
            start = cut.start if cut is not None and cut.dim == dim else 0
            blocks = scale.narrow(dim, start // block, -(-(start + size) // block) - start // block)
            scale = blocks.repeat_interleave(block, dim).narrow(dim, start % block, size)
        return _part(self._mapped(name, stored), shape, cut).float().mul_(scale)

    def _block_scales(self, name: str, stored: Stored) -> Tensor:
        scales = self._stored.get(name + SCALE_SUFFIX)
        if self._fp8_block is None or scales is None or len(stored.shape) != 2:
            raise ConfigError(f"{stored.file}: {name} is fp8, but it or config.json's quantization_config lacks what block scales need")
        (rows, columns), (block_rows, block_columns) = stored.shape, self._fp8_block
        if scales.shape != (-(-rows // block_rows), -(-columns // block_columns)):
            raise ConfigError(f"{stored.file}: {name}{SCALE_SUFFIX} of shape {list(scales.shape)} does not cover {list(stored.shape)}")
        self._count(name + SCALE_SUFFIX, scales, scales.num_bytes)
        return self._mapped(name + SCALE_SUFFIX, scales)

    def _count(self, name: str, stored: Stored, num_bytes: int) -> None:
        """What a rank leaves to others is no part of its total."""
        with self._lock:
            self._unread.discard(name)
            self._loaded_bytes += num_bytes
            self._total_bytes -= stored.num_bytes - num_bytes
            self._progress(self._loaded_bytes, self._total_bytes)


def _part(tensor: Tensor, shape: Sequence[int], cut: Cut | None) -> Tensor:
    return tensor if cut is None else tensor.narrow(cut.dim, cut.start, shape[cut.dim])


def _fits_blocks(rows: Sequence[int], columns: int) -> bool:
    return columns % BLOCK == 0 and rows[-1] % FP8_ROWS == 0 and all(count % BLOCK == 0 for count in rows[:-1])


def weights_hash(model_dir: Path) -> str:
    """16 hex digits that differ when the model's numbers differ, without reading them all.

    Covers config.json and, of each weight file, name, size, header and samples of the data.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in _weight_files(model_dir):
            size = path.stat().st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            digest.update(_read_header(path))
            with path.open("rb") as file:
                for i in range(HASHED_SAMPLES):
                    file.seek(size * i // HASHED_SAMPLES)
                    digest.update(file.read(HASHED_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_dir}: {error}") from None
    return digest.hexdigest()[:16]


def _carries_nothing(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints hold and that inference does not use."""
    if name.endswith("rotary_emb.inv_freq") or (config.is_tied and name == "lm_head.weight"):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config.num_layers  # multi-token prediction modules stand behind the last layer


def _weight_files(model_dir: Path) -> list[Path]:
    if (model_dir / INDEX).exists():
        return sorted({model_dir / file for file in _weight_map(model_dir).values()})
    if (model_dir / SINGLE).exists():
        return [model_dir / SINGLE]
    raise ConfigError(f"{model_dir}: neither {INDEX} nor {SINGLE} is there")


def _weight_map(model_dir: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((model_dir / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{model_dir / INDEX}: {type(error).__name__} {error}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == os.path.basename(f) for f in weight_map.values()):
        raise ConfigError(f"{model_dir / INDEX}: weight_map must map tensor names to names of files in the same folder")
    return weight_map


def _stored_tensors(model_dir: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in _weight_files(model_dir):
        header = _parse_header(path)
        for name, entry in header.items():
            stored[name] = Stored(path, entry["dtype"], tuple(entry["shape"]))
    if (model_dir / INDEX).exists():
        absent = sorted(_weight_map(model_dir).keys() - stored.keys())
        if absent:
            raise ConfigError(f"{model_dir}: {INDEX} names {len(absent)} tensors that no file holds, the first: {absent[0]}")
    return stored


def _parse_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets}. Raises ConfigError if the file is not safetensors or was cut off."""
    raw = _read_header(path)
    try:
        safe_open(path, framework="pt", device="cpu")  # checks offsets, sizes and that nothing is cut off
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
    header: dict[str, dict[str, Any]] = json.loads(raw)
    header.pop("__metadata__", None)
    return header


def _read_header(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            raw = file.read(length) if length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not raw or len(raw) < length:
        raise ConfigError(f"{path}: not a safetensors file")
    return raw
