"""One farm for many tests: a tiny DeepSeek-V3, served disaggregated under one name and by a single worker under another."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.farm import Farm
from workers.random_model import write_random_model

PD, BOTH = "pd", "both"


@pytest.fixture(scope="session")
def tiny_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("v3") / "model", "deepseek-v3", seed=3)


@pytest.fixture(scope="session")
def farm(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Shims `pd` and `both`; workers prefill-1, decode-1 (model pd) and both-1 (model both)."""
    with Farm(tmp_path_factory.mktemp("farm"), tiny_v3, model=PD) as started:
        started.worker("prefill", "prefill-1", "--chunked_prefill_size", "64")
        started.worker("decode", "decode-1")
        started.worker("both", "both-1", model=BOTH)
        for name in (PD, BOTH):
            started.rest(name, model=name, wait=False)
        for name in (PD, BOTH):
            started.wait_ready(name)
        yield started
