"""A fleet as the guide's section 3.2 starts it: config servers, masters, prefill and decode, any of which may be killed or added."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.messages import CLASSES
from tests.system.farm import ROOT
from tests.system.serving import Serving, Servings, free_ports
from workers.random_model import write_random_model

pytestmark = [pytest.mark.system, pytest.mark.services]

LONG = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
SHORT = {"inputs": [4, 5], "parameters": {"max_new_tokens": 7, "ignore_eos": True}}
TOKEN = "an-open-secret-of-the-tests"
HOST = "127.0.0.1"


class Fleet(Servings):
    """One config server, masters 0 and 1, a prefill and a decode worker, by the scripts that are the guide's section 3.2."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.config_port, self.second_config_port, *self.ports = free_ports(5)
        super().__init__(folder, {
            "TOKENMILL": f"{sys.executable} -m tokenmill", "MODEL_DIR": str(model_dir), "TP": "1", "DP": "1", "LOADWORKER": "2",
            "TOKENMILL_CLUSTER_TOKEN": TOKEN, "CONFIG_SERVER_PORT": str(self.config_port), "PD_MASTER_1_PORT": str(self.ports[0]),
            "PD_MASTER_2_PORT": str(self.ports[1])})

    def config_server(self) -> None:
        self.config = self.script("config", "multi_pd_master/config_server.sh", HOST, flags="--planner advise")
        self.config.wait_said("config_server ready")

    def master(self, number: int) -> str:
        """Masters 0 and 1 by their scripts, a third one by hand."""
        if number < 2:
            self.script(f"master-{number}", f"multi_pd_master/pd_master_{number + 1}.sh", HOST, HOST)
        else:
            self.script(f"master-{number}", "multi_pd_master/pd_master_1.sh", HOST, HOST,
                        environment={"PD_MASTER_1_PORT": str(self.ports[number])})
        return f"http://{HOST}:{self.ports[number]}"

    def worker(self, role: str, name: str, *flags: str, model_dir: str = "") -> Serving:
        return self.script(name, f"multi_pd_master/pd_{role}.sh", HOST, HOST, environment={"MODEL_DIR": model_dir} if model_dir else {},
                           flags=" ".join(["--max_total_token_num 8192 --worker_id", name, *flags]))


@pytest.fixture(scope="module")
def fleet(tiny_v3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet"), tiny_v3) as fleet:
        for role in ("prefill", "decode"):
            fleet.worker(role, f"{role}-1")              # in any order: who comes early waits
        fleet.config_server()
        for number in (0, 1):
            fleet.wait_ready(fleet.master(number))
        yield fleet


def registry(fleet: Fleet, port: int = 0) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port or fleet.config_port}/registry"
    reply = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def url_of(fleet: Fleet, number: int) -> str:
    return f"http://127.0.0.1:{fleet.ports[number]}"


async def tokens_of(http: httpx.AsyncClient, url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("POST", f"{url}/generate_stream", json=body, headers=headers) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line[5:])


def test_both_masters_answer_alike_and_the_registry_knows_everybody(fleet: Fleet) -> None:
    answers = [httpx.post(f"{url_of(fleet, number)}/generate", json=SHORT, timeout=60) for number in (0, 1)]
    assert [reply.status_code for reply in answers] == [200, 200]
    assert answers[0].json()["generated_text"] == answers[1].json()["generated_text"]
    known = registry(fleet)
    assert len(known["config_servers"]) == 1 and {master["url"] for master in known["masters"]} == {url_of(fleet, 0), url_of(fleet, 1)}
    assert {worker["role"] for worker in known["workers"] if worker["alive"]} == {"prefill", "decode"}


def test_without_the_token_no_door_says_anything(fleet: Fleet) -> None:
    for path in ("/bootstrap", "/registry", "/status"):
        assert httpx.get(f"http://127.0.0.1:{fleet.config_port}{path}", timeout=10).status_code == 401
    assert httpx.get(f"{url_of(fleet, 0)}/bootstrap", timeout=10).status_code == 401
    stranger = fleet.script("stranger", "multi_pd_master/pd_decode.sh", HOST, HOST,
                            environment={"TOKENMILL_CLUSTER_TOKEN": "another-secret-of-somebody"})
    assert stranger.process.wait(60) == 2 and "cluster token" in stranger.log


async def test_a_killed_config_server_stops_nothing_and_takes_its_queue_up_again(fleet: Fleet) -> None:
    async with httpx.AsyncClient(timeout=60) as http:
        stream, indexes = tokens_of(http, url_of(fleet, 0), LONG, {}), []
        async for event in stream:
            indexes.append(event["token"]["count_output_tokens"])
            if len(indexes) == 5:
                fleet.config.kill()
        assert indexes == list(range(1, 401))
        assert (await http.post(f"{url_of(fleet, 1)}/generate", json=SHORT)).status_code == 200   # a new job, still without it
        fleet.config.start()
        await asyncio.to_thread(fleet.config.wait_said, "config_server ready", 2)
        assert "adopted" in fleet.config.log
        url = await asyncio.to_thread(fleet.master, 2)      # a new master joins, nobody is started again
        await asyncio.to_thread(fleet.wait_ready, url)
        assert (await http.post(f"{url}/generate", json=SHORT)).status_code == 200


async def test_a_killed_master_loses_no_job_and_another_one_goes_on_with_the_stream(fleet: Fleet) -> None:
    masters = {serving.name: serving for serving in fleet.all}
    headers, seen = {"X-Job-Id": "survivor"}, []
    async with httpx.AsyncClient(timeout=60) as http:
        with pytest.raises(httpx.HTTPError):
            async for event in tokens_of(http, url_of(fleet, 0), LONG, headers):
                seen.append(event["token"]["id"])
                if len(seen) == 5:
                    masters["master-0"].kill_all()
        url = f"{url_of(fleet, 1)}/jobs/survivor/stream"
        async with http.stream("GET", url, headers={"Last-Event-ID": str(len(seen) - 1)}) as response:
            assert response.status_code == 200
            rest = [line async for line in response.aiter_lines() if line.startswith("data:")]
        assert len(seen) + len(rest) >= 400
    masters["master-0"].start()
    await asyncio.to_thread(fleet.wait_ready, url_of(fleet, 0))


@pytest.mark.parametrize(("flags", "seed", "said"), [
    (["--page_size", "32"], 3, "page_size here 32, there 16"),
    pytest.param(["--data_type", "bf16"], 3, "dtype here 'bfloat16', there 'float32'", marks=pytest.mark.chaos),
    pytest.param([], 4, "weights here", marks=pytest.mark.chaos)], ids=["page size", "dtype", "weights"])
def test_a_worker_of_another_kind_is_refused_with_both_values_and_the_farm_goes_on(fleet: Fleet, tmp_path: Path, flags: list[str],
                                                                                   seed: int, said: str) -> None:
    model_dir = str(write_random_model(tmp_path / "model", "deepseek-v3", seed=seed)) if seed != 3 else ""
    odd = fleet.worker("decode", f"odd-{len(fleet.all)}", *flags, model_dir=model_dir)
    assert odd.process.wait(90) == 1
    assert said in odd.log and "cannot join the farm" in odd.log
    assert httpx.post(f"{url_of(fleet, 1)}/generate", json=SHORT, timeout=60).status_code == 200


def test_a_second_config_server_joins_and_knows_the_same(fleet: Fleet) -> None:
    second = fleet.script("config-2", "multi_pd_master/config_server.sh", HOST, flags=f"--join {HOST}:{fleet.config_port}",
                          environment={"CONFIG_SERVER_PORT": str(fleet.second_config_port)})
    second.wait_said("config_server ready")
    known = registry(fleet, fleet.second_config_port)
    assert len([server for server in known["config_servers"] if server["alive"]]) == 2
    both = [f"http://127.0.0.1:{port}/bootstrap?role=worker" for port in (fleet.config_port, fleet.second_config_port)]
    told = [httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).json() for url in both]
    assert told[0] == told[1] and "worker:" in told[0]["nats_url"]


def tokenmill(fleet: Fleet, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenmill", *args, "--url", f"http://{HOST}:{fleet.config_port}"]
    environment = {**os.environ, "TOKENMILL_CLUSTER_TOKEN": TOKEN}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


async def test_a_worker_changes_its_role_under_load_and_back_and_nothing_is_lost(fleet: Fleet) -> None:
    refused = tokenmill(fleet, "drain", "prefill-1")
    assert refused.returncode == 1 and "nobody could prefill" in refused.stderr
    fleet.worker("prefill", "turncoat")
    async with httpx.AsyncClient(timeout=120) as http:
        async def ask(number: int) -> dict[str, Any]:
            body = {"inputs": [number, 2, 3], "parameters": {"max_new_tokens": 60, "ignore_eos": True}}
            reply = await http.post(f"{url_of(fleet, number % 2)}/generate", json=body)
            assert reply.status_code == 200, reply.text
            answer: dict[str, Any] = reply.json()
            return answer

        alone = [await ask(number) for number in range(4)]
        while not any(worker["worker"] == "turncoat" and worker["alive"] for worker in registry(fleet)["workers"]):
            await asyncio.sleep(0.1)
        before = {worker["incarnation"] for worker in registry(fleet)["workers"] if worker["worker"] == "turncoat"}
        asked = [asyncio.create_task(ask(number % 4)) for number in range(24)]
        for role in ("decode", "prefill"):
            switched = await asyncio.to_thread(tokenmill, fleet, "worker", "set-role", "turncoat", role)
            assert switched.returncode == 0 and f"is {role} now" in switched.stdout, switched.stderr
            asked += [asyncio.create_task(ask(number % 4)) for number in range(8)]
        answers = await asyncio.gather(*asked)
    assert all(answer["generated_text"] == alone[index % 4]["generated_text"] for index, answer in enumerate(answers))
    after = {worker["incarnation"] for worker in registry(fleet)["workers"] if worker["worker"] == "turncoat" and worker["alive"]}
    assert after and not after & before


async def test_open_jobs_doors_queues_and_the_planner_are_shown(fleet: Fleet) -> None:
    async with httpx.AsyncClient(timeout=120) as http:
        body = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 2400, "ignore_eos": True}}
        headers = {"X-Job-Id": "watched", "X-Tenant": "me"}
        asking = asyncio.create_task(http.post(f"{url_of(fleet, 1)}/generate", json=body, headers=headers))
        rows: list[dict[str, Any]] = []
        while not rows and not asking.done():
            listed = await asyncio.to_thread(tokenmill, fleet, "jobs", "list", "--json")
            rows = [row for row in json.loads(listed.stdout) if row["job_id"] == "watched"]
        assert (rows[0]["tenant"], rows[0]["klass"], rows[0]["tokens"]) == ("me", "normal", 2403)
        assert (await asyncio.to_thread(tokenmill, fleet, "jobs", "cancel", "watched")).returncode == 0
        assert (await asking).status_code == 499
    said = await asyncio.to_thread(tokenmill, fleet, "status", "--json")
    status = json.loads(said.stdout)
    assert len(status["masters"]) >= 3 and status["config_servers"] and set(status["queues"]) == {*CLASSES, "handoff"}
    assert status["roles"]["prefill"] >= 1 and status["planner"]["mode"] == "advise" and status["planner"]["proposal"]["reason"]
    table = await asyncio.to_thread(tokenmill, fleet, "status")
    assert all(word in table.stdout for word in ("prefill-1", "decode-1", "handoff", "master", "planner (advise)")), table.stdout


def test_a_drained_worker_leaves_with_its_supervisor_and_is_not_started_again(fleet: Fleet) -> None:
    turncoat = next(serving for serving in fleet.all if serving.name == "turncoat")
    drained = tokenmill(fleet, "drain", "turncoat")
    assert drained.returncode == 0 and "has left" in drained.stdout, drained.stderr
    assert turncoat.process.wait(60) == 0 and "was drained" in turncoat.log
    assert tokenmill(fleet, "worker", "show", "turncoat").returncode == 1
    assert json.loads(tokenmill(fleet, "worker", "show", "prefill-1").stdout)[0]["role"] == "prefill"


def test_no_role_was_refused_anything_that_it_needs(fleet: Fleet) -> None:
    """Last in this file: whatever the tests above had the fleet do went through the users' permissions."""
    assert "Permissions Violation" not in (fleet.folder / "state-config/nats/server.log").read_text()
