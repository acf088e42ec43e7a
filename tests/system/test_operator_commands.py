"""What an operator types: jobs and dead letters from the command line."""

import asyncio
import json
import subprocess
import sys

import httpx
import pytest

from coordinator import subjects
from coordinator.bus import Bus
from coordinator.messages import DeadLetter, Job, new_job_id
from coordinator.sampling import SamplingParams
from tests.system.conftest import PD
from tests.system.farm import ROOT, Farm

pytestmark = [pytest.mark.system, pytest.mark.services]


def tokenmill(farm: Farm, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenmill", *args, "--url", farm.url(PD)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_finished_job_is_shown_and_an_unknown_one_is_an_error(farm: Farm) -> None:
    job_id = new_job_id()
    body = {"inputs": [4, 5], "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
    assert httpx.post(f"{farm.url(PD)}/generate", json=body, headers={"X-Job-Id": job_id}, timeout=60).status_code == 200
    shown = json.loads(tokenmill(farm, "jobs", "show", job_id).stdout)
    assert (shown["state"], shown["reason"], shown["num_tokens"]) == ("done", "length", 5)
    assert tokenmill(farm, "jobs", "show", new_job_id()).returncode == 1


async def test_a_running_job_is_cancelled(farm: Farm) -> None:
    job_id = new_job_id()
    body = {"inputs": [4, 5], "parameters": {"max_new_tokens": 1500, "ignore_eos": True}}
    async with httpx.AsyncClient(timeout=60) as http:
        running = asyncio.create_task(http.post(f"{farm.url(PD)}/generate", json=body, headers={"X-Job-Id": job_id}))
        while (await http.get(f"{farm.url(PD)}/jobs/{job_id}")).status_code != 200:
            await asyncio.sleep(0.01)
        said = await asyncio.to_thread(tokenmill, farm, "jobs", "cancel", job_id)
        assert said.returncode == 0, said.stderr
        assert (await running).status_code == 499


async def test_a_dead_letter_is_listed_shown_replayed_and_dropped(farm: Farm) -> None:
    job = Job(job_id=new_job_id(), origin="gone", model=PD, prompt_ids=(3, 4), params=SamplingParams(max_new_tokens=4, ignore_eos=True))
    async with await Bus.connect(farm.services.nats_url, "test") as bus:
        seqs = [await bus.dead_letter(DeadLetter(subject=subjects.jobs(PD, "normal"), reason=f"reason {i}", payload=job.encode(), at_ms=i,
                                                 job_id=job.job_id), PD) for i in range(2)]
        listed = json.loads(tokenmill(farm, "dlq", "list", "--json").stdout)
        assert [row["reason"] for row in listed if row["seq"] in seqs] == ["reason 0", "reason 1"]
        assert json.loads(tokenmill(farm, "dlq", "show", str(seqs[0])).stdout)["job"]["job_id"] == job.job_id
        replayed = tokenmill(farm, "dlq", "replay", str(seqs[0])).stdout.split()[-1]
        while (record := await bus.get_result(replayed)) is None:
            await asyncio.sleep(0.02)
        assert record.reason == "length" and len(record.texts) == 4
        assert tokenmill(farm, "dlq", "drop", str(seqs[1])).returncode == 0
        assert tokenmill(farm, "dlq", "show", str(seqs[1])).returncode == 1
        assert not [seq for seq, _ in await bus.dlq_list(PD) if seq in seqs]
    await farm.wait_at_rest(model=PD)
