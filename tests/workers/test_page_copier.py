"""The copying thread: pages arrive, a copy that cannot be made is told about, and the counters say how much was moved."""

import queue
from pathlib import Path

import pytest
import torch

from coordinator.messages import KVRank
from coordinator.sampling import SamplingParams
from workers.kv_cache import KVCache
from workers.model_config import ModelConfig
from workers.page_copier import PageCopier
from workers.random_model import write_random_model
from workers.sequence import ImportSource, Sequence
from workers.step import PageCopy

PAGE_SIZE = 4
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]


class Farm:
    """A pool to copy from, full of its own slot numbers, a zeroed pool of ours, and the copier between them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        config = ModelConfig.from_dir(write_random_model(folder, "deepseek-v3"))
        self.source, self.pool = (KVCache.create(config, 10, PAGE_SIZE, torch.float32, device) for _ in range(2))
        for layer in self.source.layers:
            layer.copy_(torch.arange(layer.shape[0], device=device).unsqueeze(1))
        self._done: queue.SimpleQueue[tuple[PageCopy, str]] = queue.SimpleQueue()
        self.copier = PageCopier(self.pool, lambda copy, error: self._done.put((copy, error)))

    def copy(self, *, address: str | None = None, num_pages: int = 10, is_cancelled: bool = False) -> str:
        """Tokens 0..7 from pages 3 and 5 to pages 1 and 8; returns the error."""
        params = SamplingParams()
        copy = PageCopy(
            sequence=Sequence(job_id="a", token_ids=[0], num_prompt=1, params=params, max_kv_tokens=8),
            source=ImportSource(ranks=(KVRank(address=self.source.address if address is None else address),), num_pages=num_pages,
                                page_ids=(3, 5), num_tokens=8, layout=self.source.layout("")),
            src_pages=[3, 5], dst_pages=[1, 8], num_tokens=8, is_cancelled=is_cancelled)
        self.copier.start(copy)
        done, error = self._done.get(timeout=30)
        assert done is copy
        return error

    def slots(self, *pages: int) -> list[int]:
        return [int(self.pool.layers[-1][page * PAGE_SIZE + i, 0]) for page in pages for i in range(PAGE_SIZE)]


@pytest.fixture(params=DEVICES, ids=str)
def farm(tmp_path: Path, request: pytest.FixtureRequest) -> Farm:
    return Farm(tmp_path, request.param)


def test_pages_arrive_and_are_counted(farm: Farm) -> None:
    assert farm.copy() == ""
    assert farm.slots(1, 8) == [12, 13, 14, 15, 20, 21, 22, 23] and not any(farm.slots(0, 2, 3, 4, 5, 6, 7, 9))
    assert farm.copier.copied_bytes == 8 * sum(layer[0].nbytes for layer in farm.pool.layers)
    assert 0.0 < farm.copier.copy_seconds < 30.0


def test_a_cancelled_copy_moves_nothing(farm: Farm) -> None:
    assert farm.copy(is_cancelled=True) == ""
    assert not any(farm.slots(*range(10))) and farm.copier.copied_bytes == 0


def test_a_pool_that_is_gone_or_another_fails_its_own_copy_only(farm: Farm) -> None:
    assert farm.copy(address="/proc/0/fd/0").startswith("Unavailable")
    assert farm.copy(num_pages=11).startswith("LayoutMismatch")
    assert farm.copier.copied_bytes == 0
    assert farm.copy() == ""
