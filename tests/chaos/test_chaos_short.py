"""An accepted job finishes exactly once, whatever dies: one fault of each sort under load, in a minute. The long lists are beside."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.chaos import abuse_checks, report
from tests.chaos.faults import SHORT
from tests.chaos.scenario import Range, Scenario, open_range

pytestmark = [pytest.mark.services, pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]

NUM_SPECS = 24
NUM_CLIENTS = 12


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Range]:
    async with open_range(tmp_path_factory.mktemp("chaos"), lease_s=2.0, num_specs=NUM_SPECS, num_clients=NUM_CLIENTS) as opened:
        yield opened
        report.show(opened.rows, "faults under load, lease 2 s")


@pytest.mark.parametrize("scenario", SHORT, ids=[scenario.name for scenario in SHORT])
async def test_no_answer_is_lost_doubled_or_changed_by(arena: Range, scenario: Scenario) -> None:
    verdict = await arena.run(scenario)
    assert verdict.is_clean, "\n".join(verdict.details)


async def test_clients_that_leave_at_random_leave_nothing_held(arena: Range) -> None:
    await abuse_checks.check_storm(arena, calm_s=1.0, storm_s=3.0, num_clients=8)


async def test_lies_on_every_subject_change_nothing(arena: Range) -> None:
    await abuse_checks.check_fuzz(arena, 1000)
