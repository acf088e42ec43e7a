"""Pools in a GPU's memory, mapped by another process: what one writes the other reads, also after the first was killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.errors import ConfigError, LayoutMismatch, Unavailable
from coordinator.messages import KVLayout
from workers import cuda_ipc
from workers.kv_cache import KVCache
from workers.model_config import ModelConfig
from workers.random_model import write_random_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda")
NUM_PAGES, PAGE_SIZE = 40, 16

EXPORTER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from workers.kv_cache import KVCache
from workers.model_config import ModelConfig

pool = KVCache.create(ModelConfig.from_dir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), torch.bfloat16, torch.device("cuda"))
for i, layer in enumerate(pool.layers):
    layer.copy_((torch.arange(layer.numel(), device="cuda") % 251 + i).view(layer.shape))
torch.cuda.synchronize()
print(json.dumps({"address": pool.address, "layout": asdict(pool.layout("m"))}), flush=True)
for line in sys.stdin:
    for layer in pool.layers:
        layer.fill_(float(line))
    torch.cuda.synchronize()
    print("filled", flush=True)
"""


class Exporter:
    """Another process with a pool in which every number tells its place."""

    def __init__(self, model: Path) -> None:
        path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen([sys.executable, "-c", EXPORTER, str(model), str(NUM_PAGES), str(PAGE_SIZE)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
        said: dict[str, Any] = json.loads(self._line())
        self.address, self.layout = said["address"], KVLayout(**said["layout"])

    def attach(self) -> KVCache:
        return KVCache.attach(self.address, NUM_PAGES, self.layout)

    def fill(self, value: float) -> None:
        assert self._process.stdin is not None
        print(value, file=self._process.stdin, flush=True)
        assert self._line() == "filled\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def exporter(model: Path) -> Iterator[Exporter]:
    made = Exporter(model)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=["llama", "deepseek-v3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    yield write_random_model(tmp_path, request.param)
    cuda_ipc.drop_unused(0.0)


def make_pool(model: Path, num_pages: int = NUM_PAGES) -> KVCache:
    return KVCache.create(ModelConfig.from_dir(model), num_pages, PAGE_SIZE, torch.bfloat16, GPU)


def by_page(layer: torch.Tensor) -> torch.Tensor:
    """[keys and values apart, pages, numbers of a page]"""
    num_planes, num_slots = layer.shape[:2] if layer.dim() == 4 else (1, layer.shape[0])
    return layer.reshape(num_planes, num_slots // PAGE_SIZE, -1)


def exported_pages(index: int, like: torch.Tensor, pages: list[int]) -> torch.Tensor:
    """What the exporter wrote to them in its layer `index`, shaped as by_page(like)."""
    num_planes, _, page_numbers = by_page(like).shape
    numbers = torch.arange(num_planes * NUM_PAGES * page_numbers, device=like.device) % 251 + index
    return numbers.to(like.dtype).view(num_planes, NUM_PAGES, page_numbers)[:, pages]


def assert_copied(pool: KVCache, src_pages: list[int], dst_pages: list[int]) -> None:
    for i, layer in enumerate(pool.layers):
        assert torch.equal(by_page(layer)[:, dst_pages], exported_pages(i, layer, src_pages))


def test_pages_of_another_process_are_copied_and_nothing_else_changes(model: Path) -> None:
    with exporter(model) as other:
        pool = make_pool(model, 50)
        pool.copy_pages_from(other.attach(), [39, 0, 7, 8], [2, 49, 3, 20], 3 * PAGE_SIZE + 5)
        assert_copied(pool, [39, 0, 7, 8], [2, 49, 3, 20])
        untouched = sorted(set(range(50)) - {2, 49, 3, 20})
        assert not any(by_page(layer)[:, untouched].any() for layer in pool.layers)


def test_later_writes_are_seen_through_a_mapping_that_is_kept(model: Path) -> None:
    with exporter(model) as other:
        pool = make_pool(model)
        first = other.attach()
        other.fill(42.0)
        second = other.attach()
        assert first._flat.data_ptr() == second._flat.data_ptr()
        pool.copy_pages_from(second, [5], [6], 1)
        assert all((by_page(layer)[:, 6] == 42.0).all() for layer in pool.layers)


def test_pages_of_a_killed_process_are_still_there(model: Path) -> None:
    with exporter(model) as other:
        pool, mapped = make_pool(model), other.attach()
        pool.copy_pages_from(mapped, [1], [1], 1)
        torch.cuda.synchronize()
        other.kill()
        torch.full((256 << 20,), 7, dtype=torch.uint8, device=GPU)  # would land in its memory if that were free
        pool.copy_pages_from(mapped, [2, 30], [2, 3], 2 * PAGE_SIZE)
        again = other.attach()                                     # from the mapping that is kept
        pool.copy_pages_from(again, [31], [4], 1)
        assert_copied(pool, [1, 2, 30, 31], [1, 2, 3, 4])


def test_a_killed_process_cannot_be_attached_to_anew_and_its_memory_comes_back(model: Path) -> None:
    with exporter(model) as other:
        mapped = other.attach()
        other.kill()
        del mapped
        cuda_ipc.drop_unused(0.0)
        with pytest.raises(Unavailable, match="cudaIpcOpenMemHandle"):
            other.attach()
    torch.zeros(8, device=GPU).add_(1.0)  # torch does not stumble over the failure
    torch.cuda.synchronize()


def test_a_pool_of_another_size_than_told_is_refused(model: Path) -> None:
    with exporter(model) as other, pytest.raises(LayoutMismatch, match="bytes"):
        KVCache.attach(other.address, NUM_PAGES + 1, other.layout)


def test_an_attachment_in_the_same_process_is_the_pool_itself(model: Path) -> None:
    pool = make_pool(model)
    address, layout = pool.address, pool.layout("m")
    mapped = KVCache.attach(address, NUM_PAGES, layout)
    assert mapped._flat.data_ptr() == pool._flat.data_ptr()
    del pool, mapped
    with pytest.raises(Unavailable):
        KVCache.attach(address, NUM_PAGES, layout)


def test_a_dropped_pool_gives_its_memory_back(model: Path) -> None:
    free_before, _ = torch.cuda.mem_get_info()
    num_bytes = 1 << 30
    data, _ = cuda_ipc.allocate(num_bytes, GPU)
    view = data.view(torch.bfloat16)[5:]
    del data
    assert free_before - torch.cuda.mem_get_info()[0] >= num_bytes and not view.any()
    del view
    assert free_before - torch.cuda.mem_get_info()[0] < num_bytes / 2


def test_a_pool_too_large_names_the_setting(model: Path) -> None:
    with pytest.raises(ConfigError, match="max_total_token_num"):
        cuda_ipc.allocate(1 << 45, GPU)
    torch.zeros(8, device=GPU).add_(1.0)


def test_pools_on_cpu_and_gpu_hand_pages_to_each_other(model: Path) -> None:
    on_gpu = make_pool(model)
    on_cpu = KVCache.create(ModelConfig.from_dir(model), NUM_PAGES, PAGE_SIZE, torch.bfloat16, torch.device("cpu"))
    for layer in on_cpu.layers:
        layer.fill_(3.0)
    on_gpu.copy_pages_from(KVCache.attach(on_cpu.address, NUM_PAGES, on_cpu.layout("m")), [1], [2], PAGE_SIZE)
    assert all((by_page(layer)[:, 2] == 3.0).all() and not by_page(layer)[:, 1].any() for layer in on_gpu.layers)
    for layer in on_cpu.layers:
        layer.zero_()
    on_cpu.copy_pages_from(on_gpu, [2], [0], PAGE_SIZE)
    assert all((by_page(layer)[:, 0] == 3.0).all() for layer in on_cpu.layers)
