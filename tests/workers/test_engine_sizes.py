"""Defaults by device, and refusals that name the setting."""

from typing import Any

import pytest
import torch

from coordinator.errors import ConfigError
from workers.engine_sizes import choose_sizes
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
    ({"mem_fraction": 1.5}, "mem_fraction"), ({"dtype": "int8"}, "dtype"), ({"max_req_total_len": 1}, "max_req_total_len")])
def test_a_setting_that_cannot_be_is_refused_by_name(config: ModelConfig, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_sizes(settings(**given), config)
