"""The KV pool: what is written is what another process reads, and pages are never mixed up."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.errors import LayoutMismatch, Unavailable
from workers.kv_cache import KVCache, bytes_per_page
from workers.model_config import ModelConfig
from workers.random_model import write_random_model

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "deepseek-v3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> ModelConfig:
    return ModelConfig.from_dir(write_random_model(tmp_path, request.param))


def make_pool(config: ModelConfig, num_pages: int = 10, page_size: int = 4, **changes: Any) -> KVCache:
    pool = KVCache.create(config, num_pages, page_size, changes.get("dtype", torch.float32), CPU, changes.get("weights", "abc"))
    for i, layer in enumerate(pool.layers):
        layer.copy_((torch.arange(layer.numel()) % 1000 + 1000 * i).view(layer.shape))
    return pool


def rows_of(pool: KVCache, slots: list[int]) -> torch.Tensor:
    slot_dim = 1 if pool.layers[0].dim() == 4 else 0
    return torch.stack([layer.index_select(slot_dim, torch.tensor(slots)) for layer in pool.layers])


def test_layers_have_the_documented_shape(config: ModelConfig) -> None:
    pool = make_pool(config)
    shape = (40, config.kv_row) if config.mla else (2, 40, config.num_kv_heads, config.head_dim)
    assert [layer.shape for layer in pool.layers] == [shape] * config.num_layers
    assert bytes_per_page(config, 4, torch.float32) * 10 == sum(layer.nbytes for layer in pool.layers)


@pytest.mark.parametrize("num_tokens", [1, 4, 11, 16])
def test_copied_pages_hold_the_tokens_in_order_and_nothing_else_changes(config: ModelConfig, num_tokens: int) -> None:
    source, dest = make_pool(config), make_pool(config, num_pages=12)
    for layer in dest.layers:
        layer.zero_()
    mapped = KVCache.attach(source.address, source.num_pages, source.layout("m"))
    src_pages, dst_pages = [2, 3, 9, 0], [5, 6, 7, 1]  # a run of two on both sides, then single pages
    dest.copy_pages_from(mapped, src_pages, dst_pages, num_tokens)
    src_slots = [src_pages[i // 4] * 4 + i % 4 for i in range(num_tokens)]
    dst_slots = [dst_pages[i // 4] * 4 + i % 4 for i in range(num_tokens)]
    assert torch.equal(rows_of(dest, dst_slots), rows_of(source, src_slots))
    untouched = sorted(set(range(48)) - set(dst_slots))
    assert not rows_of(dest, untouched).any()


def test_an_attached_pool_shows_later_writes_and_outlives_its_owner(config: ModelConfig) -> None:
    source, dest = make_pool(config), make_pool(config)
    mapped = KVCache.attach(source.address, source.num_pages, source.layout("m"))
    for layer in source.layers:
        layer.fill_(42.0)
    del layer, source
    dest.copy_pages_from(mapped, [1], [8], 4)
    assert (rows_of(dest, [32, 33, 34, 35]) == 42.0).all()


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("dtype", lambda config: make_pool(config, dtype=torch.bfloat16)),
        ("page_size", lambda config: make_pool(config, page_size=8)),
        ("weights", lambda config: make_pool(config, weights="other")),
    ],
)
def test_pools_of_another_layout_are_refused(config: ModelConfig, field: str, make: Callable[[ModelConfig], KVCache]) -> None:
    other = make(config)
    with pytest.raises(LayoutMismatch, match=field):
        make_pool(config).copy_pages_from(other, [0], [0], 1)


def test_a_pool_of_another_size_than_told_is_refused(config: ModelConfig) -> None:
    source = make_pool(config)
    with pytest.raises(LayoutMismatch, match="bytes"):
        KVCache.attach(source.address, source.num_pages + 1, source.layout("m"))
    with pytest.raises(LayoutMismatch, match="bytes"):
        KVCache.attach(source.address, source.num_pages, replace(source.layout("m"), num_layers=1))


def test_a_pool_that_is_gone_is_reported(config: ModelConfig) -> None:
    source = make_pool(config)
    address, layout = source.address, source.layout("m")
    del source
    with pytest.raises(Unavailable, match=address):
        KVCache.attach(address, 10, layout)


def test_pages_that_do_not_exist_are_refused(config: ModelConfig) -> None:
    pool = make_pool(config)
    for src, dst, num_tokens in (([10], [0], 1), ([0], [-1], 1), ([0], [0], 5)):
        with pytest.raises(ValueError, match="page"):
            pool.copy_pages_from(pool, src, dst, num_tokens)


def test_a_dropped_pool_gives_its_descriptor_back(config: ModelConfig) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    pool = make_pool(config)
    mapped = KVCache.attach(pool.address, pool.num_pages, pool.layout("m"))
    del pool, mapped
    assert count() == before
