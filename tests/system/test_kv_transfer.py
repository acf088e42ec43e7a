"""Prefill and decode apart with keys and values sent through gloo, as between two hosts: the same tokens, whoever is killed."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.system.conftest import BOTH
from tests.system.farm import Farm
from tests.system.test_answers import PROMPTS, final_record, generate, ids

pytestmark = [pytest.mark.system, pytest.mark.services]

SENT = "sent"
COLLECTIVE = ["--kv_transfer", "collective"]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def sent(farm: Farm) -> Iterator[str]:
    """The URL of a farm of its own in `farm`: a second decode worker may only map memory, and so must refuse every handle."""
    farm.worker("prefill", "prefill-sent", *COLLECTIVE, "--chunked_prefill_size", "64", model=SENT)
    farm.worker("decode", "decode-sent", *COLLECTIVE, model=SENT)
    farm.worker("decode", "decode-mapping", "--kv_transfer", "mapped", model=SENT)
    url = farm.rest(SENT, model=SENT, wait=False)
    farm.wait_ready(SENT)
    yield url
    for name in ("prefill-sent", "decode-sent", "decode-mapping", SENT):
        farm.processes.pop(name).stop()


async def answers(url: str) -> list[list[int]]:
    asked = [generate(url, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    return [ids(answer) for answer in await asyncio.gather(*asked)]


async def test_what_was_sent_gives_the_tokens_of_one_worker_and_who_cannot_fetch_it_leaves_it_to_others(farm: Farm, sent: str) -> None:
    await farm.wait_registered("decode-sent", "decode-mapping")
    assert await answers(sent) == await answers(farm.url(BOTH))
    record = await final_record(farm, (await generate(sent, PROMPTS[0], max_new_tokens=8, ignore_eos=True))["job_id"])
    assert [owner.partition(".")[0] for owner in record.workers] == ["prefill-sent", "decode-sent"]
    refusal = "KV pages of prefill-sent cannot be fetched: its memory cannot be mapped, and this worker has --kv_transfer mapped"
    for _ in range(20):  # it has pulled one of them sooner or later
        if refusal in farm.processes["decode-mapping"].log:
            break
        await answers(sent)
    assert refusal in farm.processes["decode-mapping"].log
    await farm.wait_at_rest(model=SENT)


@pytest.mark.parametrize("victim", ["prefill-sent", "decode-sent"])
async def test_a_side_that_is_killed_in_mid_transfer_costs_no_answer(farm: Farm, sent: str, victim: str) -> None:
    expected = await answers(farm.url(BOTH))
    asked = asyncio.create_task(answers(sent))
    await asyncio.sleep(0.3)
    farm.processes[victim].kill()
    farm.processes[victim].start()
    assert await asked == expected
    await farm.wait_at_rest(model=SENT)
