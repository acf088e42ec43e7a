"""Batches on a farm of two shims and two workers: every request is answered once, whoever is killed on the way."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.farm import ROOT, Farm

pytestmark = [pytest.mark.system, pytest.mark.services]

SHIMS, WORKERS = ("shim-a", "shim-b"), ("both-1", "both-2")
MAX_SUBMITTER_MB = 200


@pytest.fixture(scope="module")
def batch_farm(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    folder = tmp_path_factory.mktemp("batch")
    with Farm(folder, tiny_v3, model="batch") as farm:
        for name in WORKERS:
            farm.worker("both", name)
        for name in SHIMS:
            farm.rest(name, "--files_dir", str(folder / "files"), wait=False)
        for name in SHIMS:
            farm.wait_ready(name)
        yield farm


def command(farm: Farm, *args: str) -> list[str]:
    return [sys.executable, "-m", "tokenmill", "batch", *args, "--url", ",".join(farm.url(name) for name in SHIMS)]


def tokenmill(farm: Farm, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(farm, *args), cwd=ROOT, capture_output=True, text=True, timeout=250, input=stdin)


def started(args: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(args, cwd=ROOT, stderr=subprocess.DEVNULL)


def request(number: int, max_new_tokens: int, *, is_bad: bool = False) -> dict[str, Any]:
    parameters = {"max_new_tokens": max_new_tokens, "ignore_eos": True, **({"top_p": 2} if is_bad else {})}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/generate",
            "body": {"inputs": [3 + number % 50, 4, 5], "parameters": parameters}}


async def progress(farm: Farm) -> dict[str, Any]:
    """The newest batch, as any living shim tells it; {} while there is none."""
    async with httpx.AsyncClient(timeout=30) as http:
        for name in SHIMS:
            try:
                rows = (await http.get(f"{farm.url(name)}/v1/batches")).json()["data"]
                return dict(rows[0]) if rows else {}
            except httpx.TransportError:
                continue
    raise AssertionError("no shim lives")


async def wait_done(farm: Farm, batch_before: str, share: float, watched: subprocess.Popen[bytes]) -> tuple[str, float]:
    """(batch, most memory of the watched process in MB) once that share of a batch newer than `batch_before` is done."""
    most_mb = 0.0
    while True:
        assert watched.poll() is None, f"ended with {watched.returncode}\n{farm.logs()}"
        most_mb = max(most_mb, peak_mb(watched.pid))
        batch = await progress(farm)
        counts = batch.get("request_counts", {"total": 0})
        if batch.get("id", batch_before) != batch_before and counts["total"] \
                and counts["completed"] + counts["failed"] >= share * counts["total"]:
            return batch["id"], most_mb
        await asyncio.sleep(0.05)


def peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    peak = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(peak[0].split()[1]) / 1024 if peak else 0.0


def leader(farm: Farm, batch_id: str) -> str:
    return next(name for name in SHIMS if f"{batch_id}: led here" in farm.processes[name].log)


async def survive_kills(farm: Farm, folder: Path, num_lines: int, max_new_tokens: int) -> None:
    """Kill the submitter, the leading shim and a worker; run the submitter again; count."""
    bad = set(range(17, num_lines, 97))
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(request(i, max_new_tokens, is_bad=i in bad)) + "\n" for i in range(num_lines)))
    args = command(farm, "run", str(source), "--output", str(out), "--as_completed")
    before = (await progress(farm)).get("id", "")

    submitter = started(args)
    batch_id, most_mb = await wait_done(farm, before, 0.1, submitter)
    submitter.kill()
    submitter.wait()
    killed = leader(farm, batch_id)
    farm.processes[killed].kill()

    submitter = started(args)
    most_mb = max(most_mb, (await wait_done(farm, before, 0.4, submitter))[1])
    farm.processes[WORKERS[0]].signal(signal.SIGKILL)
    most_mb = max(most_mb, (await wait_done(farm, before, 0.6, submitter))[1])
    farm.processes[WORKERS[0]].process.wait()
    farm.processes[WORKERS[0]].start()
    farm.processes[killed].start()
    while submitter.poll() is None:
        await asyncio.sleep(0.05)
        if submitter.poll() is None:
            most_mb = max(most_mb, peak_mb(submitter.pid))
    assert submitter.returncode == 1, "some lines were refused"

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"r{i}" for i in range(num_lines)), "each once"
    for row in rows:
        response, number = row["response"], int(row["custom_id"][1:])
        if number in bad:
            assert response["status_code"] == 400 and response["body"]["message"].startswith("top_p"), row
        else:
            assert response["status_code"] == 200 and response["body"]["count_output_tokens"] == max_new_tokens, row
    farm.wait_ready(killed)
    batch = (await progress(farm))
    assert (batch["id"], batch["status"]) == (batch_id, "completed")
    assert batch["request_counts"] == {"total": num_lines, "completed": num_lines - len(bad), "failed": len(bad)}
    errors = folder / "errors.jsonl"
    assert tokenmill(farm, "fetch", batch_id, "--output", str(folder / "fetched.jsonl"), "--errors", str(errors)).returncode == 1
    assert [json.loads(line)["custom_id"] for line in errors.read_text().splitlines()] == [f"r{i}" for i in sorted(bad)]
    fetched = [json.loads(line) for line in (folder / "fetched.jsonl").read_text().splitlines()]
    assert {row["custom_id"]: row for row in rows if row["response"]["status_code"] == 200} == {row["custom_id"]: row for row in fetched}
    print(f"\n{num_lines} lines, submitter at most {most_mb:.0f} MB, shims at most "
          f"{max(peak_mb(farm.processes[name].process.pid) for name in SHIMS):.0f} MB, "
          f"{batch['completed_at'] - batch['in_progress_at']} s from in_progress to completed")
    assert most_mb < MAX_SUBMITTER_MB
    await farm.wait_at_rest()


async def test_a_batch_survives_sigkill_of_its_submitter_a_shim_and_a_worker(batch_farm: Farm, tmp_path: Path) -> None:
    await survive_kills(batch_farm, tmp_path, 1000, 8)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
async def test_ten_thousand_lines_survive_the_same(batch_farm: Farm, tmp_path: Path) -> None:
    await survive_kills(batch_farm, tmp_path, 10_000, 4)


def test_prompts_are_piped_through_in_their_order(batch_farm: Farm) -> None:
    prompts = "".join(f"prompt {i}\n" for i in range(100)) + "\n"
    args = ("run", "-", "--endpoint", "/v1/completions", "--params", '{"max_tokens": 3, "ignore_eos": true}')
    said = tokenmill(batch_farm, *args, stdin=prompts)
    rows = [json.loads(line) for line in said.stdout.splitlines()]
    assert said.returncode == 0 and [row["custom_id"] for row in rows] == [f"line-{i}" for i in range(1, 101)], said.stderr
    again = tokenmill(batch_farm, *args, stdin=prompts)
    assert again.stdout == said.stdout, "the same input is the same batch: its answers are kept"


def test_submit_watch_status_fetch_and_cancel(batch_farm: Farm, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(request(i, 5)) + "\n" for i in range(20)))
    submitted = tokenmill(batch_farm, "submit", str(source), "--metadata", "who=test")
    batch_id = submitted.stdout.strip()
    assert submitted.returncode == 0 and batch_id.startswith("batch_"), submitted.stderr
    assert tokenmill(batch_farm, "watch", batch_id).returncode == 0
    shown = json.loads(tokenmill(batch_farm, "status", batch_id).stdout)
    assert (shown["status"], shown["metadata"]) == ("completed", {"who": "test"})
    fetched = tokenmill(batch_farm, "fetch", batch_id)
    assert [json.loads(line)["custom_id"] for line in fetched.stdout.splitlines()] == [f"r{i}" for i in range(20)]
    refused = tokenmill(batch_farm, "cancel", batch_id)
    assert refused.returncode == 1 and "completed" in refused.stderr


def test_a_line_that_is_no_request_fails_the_batch_and_is_named(batch_farm: Farm, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request(0, 5)) + "\nnot JSON\n")
    said = tokenmill(batch_farm, "submit", str(source), "--watch")
    assert said.returncode == 1 and "line 2: this line is not valid JSON" in said.stderr
