"""The mock engine: real bookkeeping, made-up tokens, the time that its costs say."""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.errors import ConfigError
from coordinator.messages import pack_ids
from coordinator.sampling import SamplingParams
from coordinator.tasks import end
from workers.engine_messages import (
    Activate,
    AddSequence,
    Event,
    Failed,
    Imported,
    ImportSequence,
    Pinned,
    ReleasePin,
    SetRole,
    Shutdown,
    Tokens,
)
from workers.mock_costs import MockCosts
from workers.mock_engine import MockEngine, prompt_digest, token_at
from workers.settings import EngineSettings

VOCAB = 1000
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))
    return EngineSettings(model_dir=str(tmp_path), model_name="m", role="both", engine="mock", mock_costs="prefill=1000000,step_ms=0.1",
                          page_size=2, max_total_token_num=64, max_req_total_len=64)


class Driven:
    def __init__(self, settings: EngineSettings) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.engine = MockEngine(settings, (0,), self.events.put_nowait)
        self.task = asyncio.create_task(self.engine.run())

    async def until(self, kind: type[Event]) -> Event:
        while True:
            event = await asyncio.wait_for(self.events.get(), 10.0)
            if isinstance(event, kind):
                return event

    async def tokens(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            event = await self.until(Tokens)
            assert isinstance(event, Tokens)
            found += [row.token_id for row in event.rows]
        return found


def add(prompt: list[int], num_new: int, job_id: str = "a", output: tuple[int, ...] = ()) -> AddSequence:
    return AddSequence(job_id=job_id, token_ids=pack_ids([*prompt, *output]), num_prompt=len(prompt),
                       params=SamplingParams(max_new_tokens=num_new))


def expected(prompt: list[int], num_new: int) -> list[int]:
    return [token_at(prompt_digest(prompt), index, VOCAB) for index in range(num_new)]


async def test_tokens_follow_from_the_prompt_and_the_index_also_where_a_sequence_goes_on(settings: EngineSettings) -> None:
    driven = Driven(settings)
    driven.engine.send(add(PROMPT, 6))
    whole = await driven.tokens(6)
    driven.engine.send(add(PROMPT, 6, "b", tuple(whole[:4])))
    assert whole == expected(PROMPT, 6)
    assert await driven.tokens(2) == whole[4:]
    driven.engine.send(Shutdown())
    await driven.task
    driven.engine.scheduler.check_integrity()
    assert driven.engine.scheduler.num_held_pages == 0


async def test_a_second_prompt_with_the_same_beginning_finds_it_in_the_prefix_cache(settings: EngineSettings) -> None:
    driven = Driven(settings)
    driven.engine.send(add(PROMPT, 1))
    await driven.tokens(1)
    driven.engine.send(add([*PROMPT, 10, 11], 1, "b"))
    event = await driven.until(Tokens)
    assert isinstance(event, Tokens) and event.prefilled[0].cached_tokens == 4
    await end([driven.task])


async def test_a_pinned_prompt_is_imported_by_another_mock_engine_which_goes_on_with_it(settings: EngineSettings) -> None:
    giver, taker = Driven(replace(settings, role="prefill")), Driven(replace(settings, role="decode"))
    giver.engine.send(add(PROMPT, 4))
    first = await giver.tokens(1)
    pinned = await giver.until(Pinned)
    assert isinstance(pinned, Pinned)
    ready = giver.engine.ready
    taker.engine.send(ImportSequence(
        job_id="a", token_ids=pack_ids([*PROMPT, *first]), num_prompt=len(PROMPT), params=SamplingParams(max_new_tokens=4),
        num_kv_tokens=pinned.num_tokens, source=ready.pool, page_ids=pinned.page_ids, layout=ready.layout))
    imported = await taker.until(Imported)
    assert isinstance(imported, Imported) and imported.ok
    giver.engine.send(ReleasePin(job_id="a"))
    taker.engine.send(Activate(job_id="a"))
    assert first + await taker.tokens(3) == expected(PROMPT, 4)
    for driven in (giver, taker):
        driven.engine.send(Shutdown())
        await driven.task
        driven.engine.scheduler.check_integrity()
        assert driven.engine.scheduler.num_held_pages == 0


async def test_pages_of_a_real_engine_and_guided_jobs_are_refused(settings: EngineSettings) -> None:
    driven = Driven(replace(settings, role="decode"))
    ready = driven.engine.ready
    driven.engine.send(ImportSequence(
        job_id="a", token_ids=pack_ids([1, 2, 3]), num_prompt=2, params=SamplingParams(max_new_tokens=4), num_kv_tokens=2,
        source=ready.pool, page_ids=(0,), layout=replace(ready.layout, weights="1234")))
    imported = await driven.until(Imported)
    assert isinstance(imported, Imported) and not imported.ok
    guided = replace(add(PROMPT, 3, "g"), params=SamplingParams.parse({"guided_json": '{"type": "object"}', "max_new_tokens": 3}))
    driven.engine.send(guided)
    failed = await driven.until(Failed)
    assert isinstance(failed, Failed) and failed.field == "guided_json"
    await end([driven.task])


def test_costs_add_up_and_what_cannot_be_is_refused_by_name() -> None:
    costs = MockCosts.parse("prefill=100,step_ms=10,seq_ms=1")
    assert costs.step_s(50, 0) == pytest.approx(0.5)
    assert costs.step_s(0, 5) == pytest.approx(0.015)
    for text in ("speed=3", "prefill=fast", "prefill=0", "step_ms=-1"):
        with pytest.raises(ConfigError, match="--mock_costs"):
            MockCosts.parse(text)


def test_a_fleet_of_mock_workers_never_loads_torch() -> None:
    code = "import sys, workers.mock_fleet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_a_mock_engine_takes_another_role_as_the_real_one_does(settings: EngineSettings) -> None:
    driven = Driven(replace(settings, role="prefill"))
    driven.engine.send(add(PROMPT, 4))
    await driven.until(Pinned)
    driven.engine.send(SetRole(role="both"))
    driven.engine.send(add(PROMPT, 4, "b"))
    assert await driven.tokens(4) == expected(PROMPT, 4)      # not pinned after the first one, and nothing is left of the former
    assert driven.engine.scheduler.num_held_pages == 0
    await end([driven.task])
