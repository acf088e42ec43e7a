"""Defaults by device, and refusals that name the setting."""

from typing import Any

import pytest
import torch

from coordinator.errors import ConfigError
from workers.engine_sizes import choose_sizes, resolve
from workers.model_config import ModelConfig
from workers.random_model import write_random_model
from workers.settings import EngineSettings


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_dir(write_random_model(tmp_path_factory.mktemp("model") / "tiny", "llama", dtype="bfloat16"))


def settings(**given: Any) -> EngineSettings:
    return EngineSettings(model_dir="unused", model_name="tiny", **{"role": "both", **given})


def test_a_cpu_gets_small_pages_and_chunks_and_computes_in_float32(config: ModelConfig) -> None:
    sizes = choose_sizes(settings(), config)
    assert (sizes.page_size, sizes.chunk_size, sizes.dtype, sizes.max_seq_len) == (16, 512, torch.float32, config.max_position)
    assert 0 < sizes.num_pages * sizes.page_size * config.num_layers * config.kv_row * 4 <= 4 << 30


def test_given_sizes_are_kept(config: ModelConfig) -> None:
    sizes = choose_sizes(settings(max_total_token_num=1000, page_size=8, chunked_prefill_size=33, running_max_req_size=5, dtype="bfloat16",
                                  max_req_total_len=100), config)
    assert (sizes.num_pages, sizes.chunk_size, sizes.max_num_seqs, sizes.dtype, sizes.max_seq_len) == (125, 33, 5, torch.bfloat16, 100)


@pytest.mark.parametrize(("given", "text"), [
    ({"role": "judge"}, "role must be"), ({"page_size": -1}, "page_size"), ({"max_total_token_num": 7}, "no room for a KV page"),
    ({"mem_fraction": 1.5}, "mem_fraction"), ({"graph_max_batch_size": 0}, "--graph_max_batch_size"),
    ({"device": "cuda:0", "page_size": 48}, "--page_size must be a power of two"),
    ({"device": "cuda:0", "max_total_token_num": 63}, "no room for a KV page"),
    ({"dtype": "int8"}, "dtype"), ({"max_req_total_len": 1}, "max_req_total_len")])
def test_a_setting_that_cannot_be_is_refused_by_name(config: ModelConfig, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_sizes(settings(**given), config)


def test_a_gpu_gets_large_pages_and_chunks_and_leaves_the_pool_to_what_is_free_beside_the_weights(config: ModelConfig) -> None:
    sizes = choose_sizes(settings(device="cuda:0"), config)
    assert (sizes.page_size, sizes.chunk_size, sizes.max_num_seqs, sizes.num_pages) == (64, 8192, 256, 0)
    assert (sizes.dtype, choose_sizes(settings(device="cuda:0", max_total_token_num=6400), config).num_pages) == (torch.bfloat16, 100)


def test_without_a_gpu_auto_is_the_cpu_and_steps_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    chosen = resolve(settings(device="auto"))
    assert (chosen.device, chosen.depth, resolve(settings(device="cpu", depth=2)).depth) == ("cpu", 1, 2)
    with pytest.raises(ConfigError, match=r"--device cuda: PyTorch .* finds no CUDA device here"):
        resolve(settings(device="cuda"))


def test_with_gpus_auto_is_the_first_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve(settings(device=name)).device for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
    assert resolve(settings(device="auto")).depth == 2
    for name, text in (("cuda:2", "only 2 CUDA devices"), ("cuda:x", "must be auto, cpu"), ("tpu", "must be auto, cpu")):
        with pytest.raises(ConfigError, match=f"--device.*{text}"):
            resolve(settings(device=name))


def test_flash_attention_3_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of 2020")
    monkeypatch.setattr("workers.engine_sizes.FA3_PACKAGES", ("no_such_package",))
    for capability, device, text in (((8, 0), "cuda", "cuda:0 is a GPU of 2020"), ((9, 0), "cuda", "no_such_package is installed"),
                                     ((9, 0), "cpu", "the device is the CPU")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ConfigError, match=f"--enable_fa3: .*{text}"):
            resolve(settings(device=device, use_fa3=True))
