"""Abort storms, overload, jobs that kill their workers, ten thousand lies: the farm keeps its word to everybody else."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.chaos import abuse_checks
from tests.chaos.scenario import Range, open_range
from tests.system.farm import ROOT

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

MAX_QUEUED = 32
RESULTS = ROOT / "bench" / "results" / "abuse.json"
Figures = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def figures() -> Figures:
    return {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def arena(tmp_path_factory: pytest.TempPathFactory, figures: Figures) -> AsyncIterator[Range]:
    async with open_range(tmp_path_factory.mktemp("abuse"), lease_s=5.0, num_specs=48, max_queued=MAX_QUEUED) as opened:
        yield opened
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
        print("\n" + json.dumps(figures, indent=2))


async def test_half_of_all_clients_leaving_at_random_leaves_the_rest_served_and_nothing_held(arena: Range, figures: Figures) -> None:
    figures["abort storm"] = await abuse_checks.check_storm(arena, calm_s=15.0, storm_s=60.0, num_clients=16)


async def test_three_times_the_load_is_refused_with_a_time_to_come_back_and_what_was_accepted_is_answered(
        arena: Range, figures: Figures) -> None:
    figures["overload x3"] = await abuse_checks.check_overload(arena, max_queued=MAX_QUEUED, num_jobs=400, num_probes=300)


@pytest.mark.parametrize("how", ["worker killed", "engine killed", "engine crashes"])
async def test_a_job_that_kills_its_workers_is_withdrawn_and_can_be_replayed(arena: Range, figures: Figures, how: str) -> None:
    figures[f"poison, {how}"] = await abuse_checks.check_poison(arena, how=how)


async def test_ten_thousand_lies_change_nothing(arena: Range, figures: Figures) -> None:
    figures["fuzz"] = await abuse_checks.check_fuzz(arena, 10_000)
