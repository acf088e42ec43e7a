"""Where the engine runs and how large its pool, steps and batches are: settings where given, else by device and free memory."""

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coordinator.errors import ConfigError
from workers.kv_cache import bytes_per_page
from workers.model_config import ModelConfig
from workers.parallel_sizes import ParallelSizes
from workers.settings import EngineSettings, RankSettings

CPU_PAGE_SIZE, GPU_PAGE_SIZE = 16, 64
CPU_CHUNK_SIZE, GPU_CHUNK_SIZE = 512, 8192
CPU_MAX_SEQS, GPU_MAX_SEQS = 64, 256
CPU_BACKGROUND_TOKENS, GPU_BACKGROUND_TOKENS = 64, 2048   # some 100 ms and 20 ms: so long waits whoever comes in mid-step
CPU_POOL_BYTES = 4 << 30           # at most, unless max_total_token_num says more: other workers share the machine's memory
MIN_GPU_PAGE_SIZE = 16
ROLES = ("prefill", "decode", "both")
FA3_PACKAGES = ("flash_attn_interface", "flash_attn")
HOPPER = 9                         # major compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """`num_pages` 0: the executor takes what the weights leave (on a GPU only: there nobody else takes memory meanwhile)."""

    dtype: torch.dtype
    page_size: int
    num_pages: int
    max_seq_len: int
    max_num_seqs: int
    chunk_size: int
    background_tokens: int


def resolve(settings: EngineSettings) -> EngineSettings:
    """The same with a device that is there instead of "auto", and the depth that goes with it. Raises ConfigError."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and settings.ranks.tp > 1:
        name = _gpu_of_rank(name, settings.ranks)
    if name != "cpu":
        name = f"cuda:{_gpu_index(name)}"
    if settings.depth not in (0, 1, 2):
        raise ConfigError(f"depth must be 1 or 2 (0: by device), got {settings.depth}")
    if settings.use_fa3 and settings.device != "auto":
        raise ConfigError(f"--enable_fa3: {_why_no_fa3(name)}")
    if settings.use_fa3:   # a wish for whatever device is found, as LightLLM's guide writes it everywhere: said, and not a reason to stop
        print(f"--enable_fa3 changes nothing here: {_why_no_fa3(name)}", file=sys.stderr, flush=True)
    return replace(settings, device=name, depth=settings.depth or (1 if name == "cpu" else 2), use_fa3=False)


def _gpu_of_rank(name: str, ranks: RankSettings) -> str:
    """The n-th rank of a node has its n-th visible GPU."""
    if name not in ("cuda", f"cuda:{ranks.local_rank}"):
        raise ConfigError(f"--device {name} names one GPU, and --tp {ranks.tp} needs one for each rank: say cuda, and choose among them by "
                          "CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if ranks.num_local > count:
        raise ConfigError(f"--tp {ranks.tp}: this node would run {ranks.num_local} ranks, and {count} GPUs are visible here "
                          "(CUDA_VISIBLE_DEVICES, --nnodes; --device cpu needs none)")
    return f"cuda:{ranks.local_rank}"


def _gpu_index(name: str) -> int:
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdigit() or name == "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(f"--device {name}: PyTorch {torch.__version__} finds no CUDA device here")
    if int(number or 0) >= count:
        raise ConfigError(f"--device {name}: there are only {count} CUDA devices, numbered from 0")
    return int(number or 0)


def _why_no_fa3(device: str) -> str:
    if device == "cpu":
        return "Flash Attention 3 needs a Hopper GPU, and the device is the CPU"
    if torch.cuda.get_device_capability(torch.device(device))[0] != HOPPER:
        return f"Flash Attention 3 needs a Hopper GPU, and {device} is a {torch.cuda.get_device_name(device)}"
    if not any(importlib.util.find_spec(package) for package in FA3_PACKAGES):
        return f"none of the packages {', '.join(FA3_PACKAGES)} is installed"
    return "this version has no use for it yet; its own kernels run without the flag"


def choose_sizes(settings: EngineSettings, config: ModelConfig) -> EngineSizes:
    """For `resolve`d settings. Raises ConfigError naming the flag that cannot be."""
    is_cpu = settings.device == "cpu"
    for name in ("page_size", "max_total_token_num", "running_max_req_size", "chunked_prefill_size", "num_threads"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"--{name} must not be negative, got {getattr(settings, name)}")
    if settings.role not in ROLES:
        raise ConfigError(f"--role must be one of {', '.join(ROLES)}, got {settings.role!r}")
    if not 0.0 < settings.mem_fraction <= 1.0:
        raise ConfigError(f"--mem_fraction must be above 0 and at most 1, got {settings.mem_fraction:g}")
    if settings.max_req_total_len < 2:
        raise ConfigError(f"--max_req_total_len must be at least 2, got {settings.max_req_total_len}")
    if settings.graph_max_batch_size < 1:
        raise ConfigError(f"--graph_max_batch_size must be at least 1, got {settings.graph_max_batch_size}: --disable_cudagraph turns "
                          "graphs off")
    dtype = _dtype(settings, config, is_cpu)
    page_size = settings.page_size or (CPU_PAGE_SIZE if is_cpu else GPU_PAGE_SIZE)
    if not is_cpu and (page_size < MIN_GPU_PAGE_SIZE or page_size & (page_size - 1)):
        raise ConfigError(f"--page_size must be a power of two and at least {MIN_GPU_PAGE_SIZE} on a GPU, got {page_size}")
    num_pages = settings.max_total_token_num // page_size
    if is_cpu and not settings.max_total_token_num:
        num_pages = _pool_bytes(settings) // settings.ranks.num_local // bytes_per_page(_ranks_share(settings, config), page_size, dtype)
    if num_pages < 1 and (is_cpu or settings.max_total_token_num):
        raise ConfigError(f"--max_total_token_num {settings.max_total_token_num}, --mem_fraction {settings.mem_fraction:g}: "
                          f"no room for a KV page of {page_size} tokens")
    return EngineSizes(
        dtype=dtype, page_size=page_size, num_pages=num_pages, max_seq_len=min(settings.max_req_total_len, config.max_position),
        max_num_seqs=settings.running_max_req_size or (CPU_MAX_SEQS if is_cpu else GPU_MAX_SEQS),
        chunk_size=settings.chunked_prefill_size or (CPU_CHUNK_SIZE if is_cpu else GPU_CHUNK_SIZE),
        background_tokens=CPU_BACKGROUND_TOKENS if is_cpu else GPU_BACKGROUND_TOKENS)


def _ranks_share(settings: EngineSettings, config: ModelConfig) -> ModelConfig:
    """What one rank's cache holds of the model."""
    return ParallelSizes(tp=settings.ranks.tp, dp=settings.ranks.dp).local(config)


def _dtype(settings: EngineSettings, config: ModelConfig, is_cpu: bool) -> torch.dtype:
    name = settings.dtype if settings.dtype != "auto" else ("float32" if is_cpu else config.dtype)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ConfigError(f"--data_type: dtype must be auto, float32, bfloat16 or float16, got {settings.dtype!r}")
    return dtype


def _pool_bytes(settings: EngineSettings) -> int:
    return min(CPU_POOL_BYTES, int(_available_memory_bytes() * settings.mem_fraction / 2))


def _available_memory_bytes() -> int:
    """Linux's own estimate; elsewhere a size that any machine has."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2 << 30
