"""Every process, server and connection of a farm broken in turn under load; the figures go to bench/results/chaos.json."""

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos import report
from tests.chaos.chaos_farm import WORKERS
from tests.chaos.faults import LONG, PARTITIONS
from tests.chaos.scenario import Range, Scenario, open_range
from tests.system.farm import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

NUM_SPECS = 96
LEASE_S = 5.0
RESULTS = ROOT / "bench" / "results" / "chaos"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Range]:
    async with open_range(tmp_path_factory.mktemp("chaos"), lease_s=LEASE_S, num_specs=NUM_SPECS, proxied=WORKERS) as opened:
        yield opened
        report.show(opened.rows, f"faults under load, lease {LEASE_S:g} s")
        report.write(opened.rows, RESULTS, lease_s=LEASE_S, cores=os.cpu_count(), clients=opened.num_clients,
                     jobs=sum(row.jobs for row in opened.rows))


@pytest.mark.parametrize("scenario", [*LONG, *PARTITIONS], ids=[scenario.name for scenario in [*LONG, *PARTITIONS]])
async def test_no_answer_is_lost_doubled_or_changed_by(arena: Range, scenario: Scenario) -> None:
    verdict = await arena.run(scenario)
    assert verdict.is_clean, "\n".join(verdict.details)
