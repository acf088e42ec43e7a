"""Random checkpoints without a file: every tensor is drawn on the device when the model asks for it.

Weights are normal(0, 0.02) with a seed per name and norms are 1, so that routing is as spread as a real model's: tensors drawn from
one seed, or much smaller ones, send all tokens to the same experts and make decoding look faster than memory allows.
"""

import threading
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from kernels.block_fp8 import BLOCK
from workers.loader import SCALE_SUFFIX, Checkpoint, Stored
from workers.model_config import ModelConfig
from workers.random_model import tensor_shapes

STD = 0.02
FP8_STD = 100.0          # of the stored e4m3 numbers, whose largest is 448
FP8_MAX = 448.0
SCALE_SPREAD = 0.25      # scales of blocks differ by so much, up and down
NOT_QUANTIZED = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight")
NOWHERE = Path("random")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}


class RandomWeights(Checkpoint):
    """A checkpoint of `config` that looks like a loaded one to a model: in fp8 with block scales if the config says so, else in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, *,
                 keeps_fp8: bool | None = None) -> None:  # in place of Checkpoint's, which opens files
        self.dtype = dtype
        self.device = device
        self.keeps_fp8 = (device.type == "cuda" if keeps_fp8 is None else keeps_fp8) and config.fp8_block == (BLOCK, BLOCK)
        self._started_at = time.monotonic()
        self._dir = NOWHERE
        self._seed = seed
        self._fp8_block = config.fp8_block
        self._stored = _stored(config, dtype)
        self._unread = set(self._stored)
        self._total_bytes = sum(stored.num_bytes for stored in self._stored.values())
        self._loaded_bytes = 0
        self._progress = lambda loaded, total: None
        self._handles = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return self._total_bytes

    def tensors(self) -> dict[str, Stored]:
        """What a file of these weights would hold."""
        return dict(self._stored)

    def draw(self, name: str) -> Tensor:
        """One tensor as a file would hold it, on the device. The same each time."""
        return self._mapped(name, self._stored[name])

    def _mapped(self, name: str, stored: Stored) -> Tensor:
        dtype = DTYPES[stored.dtype]
        if name.endswith("norm.weight"):
            return torch.ones(stored.shape, dtype=dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if name.endswith(SCALE_SUFFIX):
            spread = torch.empty(stored.shape, dtype=dtype, device=self.device)
            return spread.uniform_(1 - SCALE_SPREAD, 1 + SCALE_SPREAD, generator=generator).mul_(STD / FP8_STD)
        if dtype == torch.float8_e4m3fn:
            wide = torch.empty(stored.shape, dtype=torch.float32, device=self.device)
            return wide.normal_(0.0, FP8_STD, generator=generator).clamp_(-FP8_MAX, FP8_MAX).to(dtype)
        return torch.empty(stored.shape, dtype=dtype, device=self.device).normal_(0.0, STD, generator=generator)


def _stored(config: ModelConfig, dtype: torch.dtype) -> dict[str, Stored]:
    code = next(code for code, each in DTYPES.items() if each == dtype)
    found: dict[str, Stored] = {}
    for name, shape in tensor_shapes(config):
        if config.fp8_block is not None and len(shape) == 2 and not name.endswith(NOT_QUANTIZED):
            blocks = tuple(-(-size // block) for size, block in zip(shape, config.fp8_block, strict=True))
            found[name] = Stored(NOWHERE, "F8_E4M3", shape)
            found[name + SCALE_SUFFIX] = Stored(NOWHERE, "F32", blocks)
        else:
            found[name] = Stored(NOWHERE, "F32" if name.endswith("e_score_correction_bias") else code, shape)
    return found
