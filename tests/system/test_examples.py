"""The programs under examples/ run as they are against a farm: tokenmill's client, and plain NATS clients of two languages.

The one in JavaScript needs node, and TOKENMILL_TEST_NODE_MODULES: a folder where its three packages were installed by npm.
"""

import asyncio
import os
import shutil
import sys
from pathlib import Path

import httpx
import pytest

from coordinator.bus import Bus
from tests.system.conftest import PD
from tests.system.farm import ROOT, Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

EXAMPLES = ROOT / "examples"


async def output(*command: str, cwd: Path = ROOT) -> tuple[str, str]:
    """(stdout, stderr) of a program that must end well."""
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                                   stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    stdout, stderr = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 0, stderr.decode()
    return stdout.decode(), stderr.decode()


async def test_a_plain_nats_client_in_python_streams_a_job_of_a_prefill_and_a_decode_worker(farm: Farm) -> None:
    text, said = await output(sys.executable, str(EXAMPLES / "plain_nats.py"), farm.services.nats_url, PD, "What is AI?")
    assert text.strip() and "accepted as number" in said
    assert "prefill-1" in said and (": 24 tokens" in said or "stop:" in said)


@pytest.mark.skipif(shutil.which("node") is None or "TOKENMILL_TEST_NODE_MODULES" not in os.environ, reason="no node, or not its packages")
async def test_a_plain_nats_client_in_javascript_reads_the_same_answer_as_the_final_record(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(os.environ["TOKENMILL_TEST_NODE_MODULES"])
    shutil.copy(EXAMPLES / "plain_nats.mjs", tmp_path)
    text, said = await output("node", "plain_nats.mjs", farm.services.nats_url, PD, "What is AI?", cwd=tmp_path)
    assert "accepted as number" in said and "prefill-1" in said
    python, _ = await output(sys.executable, "-c", GREEDY, farm.services.nats_url, PD)
    assert text.strip("\n") == python.strip("\n")


GREEDY = """
import asyncio, sys
from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient
async def main():
    async with await TokenmillClient.connect(sys.argv[1], model=sys.argv[2]) as client:
        print((await (await client.submit("What is AI?", SamplingParams(max_new_tokens=24))).result()).text)
asyncio.run(main())
"""


async def test_tokenmills_client_goes_on_in_another_connection_where_the_first_stopped(farm: Farm) -> None:
    where = (farm.services.nats_url, farm.services.redis_url, PD)
    text, said = await output(sys.executable, str(EXAMPLES / "client.py"), *where, "What is AI?")
    whole, _ = await output(sys.executable, "-c", GREEDY, farm.services.nats_url, PD)
    assert text.rstrip("\n") == whole.rstrip("\n") and "tokens" in said


async def test_a_question_from_a_shell_is_answered_by_the_farm(farm: Farm) -> None:
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        reply = await bus.request(f"ask.{PD}", b'{"inputs": "What is AI?", "parameters": {"max_new_tokens": 17}}', timeout_s=60)
    assert b'"finish_reason":"length"' in reply or b'"finish_reason":"stop"' in reply


async def test_several_answers_come_from_jobs_named_after_one(farm: Farm) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        body = {"inputs": "What is AI?", "parameters": {"n": 3, "do_sample": True, "seed": 4, "max_new_tokens": 8, "ignore_eos": True}}
        answers = [await http.post(f"{farm.url(PD)}/generate", json=body, headers={"X-Job-Id": "three"}) for _ in range(2)]
        assert [answer.headers["X-Job-Id"] for answer in answers] == ["three-0, three-1, three-2"] * 2
        assert answers[0].json() == answers[1].json()
        job = await http.get(f"{farm.url(PD)}/jobs/three-1")
    assert job.json()["generated_text"] == answers[0].json()["generated_text"][1]
