"""How large the engine's pool, steps and batches are: settings where given, else by device and free memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from coordinator.errors import ConfigError
from workers.kv_cache import bytes_per_page
from workers.model_config import ModelConfig
from workers.settings import EngineSettings

CPU_PAGE_SIZE, GPU_PAGE_SIZE = 16, 64
CPU_CHUNK_SIZE, GPU_CHUNK_SIZE = 512, 8192
CPU_MAX_SEQS, GPU_MAX_SEQS = 64, 256
CPU_POOL_BYTES = 4 << 30           # at most, unless max_total_token_num says more: other workers share the machine's memory
GPU_RESERVE_BYTES = 3 << 30        # activations of a full chunk, graphs, the library's own
ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    dtype: torch.dtype
    page_size: int
    num_pages: int
    max_seq_len: int
    max_num_seqs: int
    chunk_size: int


def choose_sizes(settings: EngineSettings, config: ModelConfig) -> EngineSizes:
    """Raises ConfigError naming the setting that cannot be."""
    is_cpu = torch.device(settings.device).type == "cpu"
    for name in ("page_size", "max_total_token_num", "running_max_req_size", "chunked_prefill_size", "num_threads"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name} must not be negative, got {getattr(settings, name)}")
    if settings.role not in ROLES:
        raise ConfigError(f"role must be one of {', '.join(ROLES)}, got {settings.role!r}")
    if not 0.0 < settings.mem_fraction <= 1.0:
        raise ConfigError(f"mem_fraction must be above 0 and at most 1, got {settings.mem_fraction:g}")
    if settings.max_req_total_len < 2:
        raise ConfigError(f"max_req_total_len must be at least 2, got {settings.max_req_total_len}")
    dtype = _dtype(settings, config, is_cpu)
    page_size = settings.page_size or (CPU_PAGE_SIZE if is_cpu else GPU_PAGE_SIZE)
    num_pages = settings.max_total_token_num // page_size
    if not settings.max_total_token_num:
        num_pages = _pool_bytes(settings, is_cpu) // bytes_per_page(config, page_size, dtype)
    if num_pages < 1:
        raise ConfigError(f"max_total_token_num {settings.max_total_token_num}, mem_fraction {settings.mem_fraction:g}: "
                          f"no room for a KV page of {page_size} tokens")
    return EngineSizes(
        dtype=dtype, page_size=page_size, num_pages=num_pages, max_seq_len=min(settings.max_req_total_len, config.max_position),
        max_num_seqs=settings.running_max_req_size or (CPU_MAX_SEQS if is_cpu else GPU_MAX_SEQS),
        chunk_size=settings.chunked_prefill_size or (CPU_CHUNK_SIZE if is_cpu else GPU_CHUNK_SIZE))


def _dtype(settings: EngineSettings, config: ModelConfig, is_cpu: bool) -> torch.dtype:
    name = settings.dtype if settings.dtype != "auto" else ("float32" if is_cpu else config.dtype)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {settings.dtype!r}")
    return dtype


def _pool_bytes(settings: EngineSettings, is_cpu: bool) -> int:
    if is_cpu:
        return min(CPU_POOL_BYTES, int(_available_memory_bytes() * settings.mem_fraction / 2))
    free, _ = torch.cuda.mem_get_info(torch.device(settings.device))
    weights = sum(file.stat().st_size for file in Path(settings.model_dir).glob("*.safetensors"))
    return max(0, int(free * settings.mem_fraction) - weights - GPU_RESERVE_BYTES)


def _available_memory_bytes() -> int:
    """Linux's own estimate; elsewhere a size that any machine has."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2 << 30
