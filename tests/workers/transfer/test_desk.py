"""Who keeps a desk."""

import pytest

from tests.workers.transfer.pools import make_pool
from workers.engine import open_desk, ways_to_pool
from workers.settings import EngineSettings
from workers.transfer.reach import AUTO, COLLECTIVE, MAPPED


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
@pytest.mark.parametrize("mode", [AUTO, COLLECTIVE])
def test_a_worker_of_any_role_can_be_asked_by_other_hosts_since_it_may_be_told_to_prefill(role: str, mode: str) -> None:
    pool = make_pool("mla", 4, 1, 0, "cpu", width=8)
    settings = EngineSettings(model_dir="", model_name="m", role=role, kv_transfer=mode)
    desk = open_desk(settings, pool)
    assert desk is not None and ways_to_pool(settings, pool, desk).desk == desk.address
    desk.close()


def test_one_that_is_mapped_only_keeps_none() -> None:
    settings = EngineSettings(model_dir="", model_name="m", role="prefill", kv_transfer=MAPPED)
    assert open_desk(settings, make_pool("mla", 4, 1, 0, "cpu", width=8)) is None
