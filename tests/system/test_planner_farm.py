"""The planner in mode act on a real farm: load that wants more prefill, then load that wants more decode; no request notices."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.farm import ROOT
from tests.system.serving import Servings, free_ports

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.chaos]

WAIT_S = 180.0
PROMPTS = {"inputs": [index % 500 + 5 for index in range(1000)], "parameters": {"max_new_tokens": 2, "ignore_eos": True}}
ANSWERS = {"inputs": [7, 8, 9], "parameters": {"max_new_tokens": 300, "ignore_eos": True}}


class Load:
    """So many clients, each of which asks again as soon as it is answered. Every answer must be whole."""

    def __init__(self, url: str, body: dict[str, Any], num_clients: int) -> None:
        self.num_done = 0
        self._url, self._body = url, body
        self._is_over = False
        self._clients = [asyncio.create_task(self._ask_again(number)) for number in range(num_clients)]

    async def _ask_again(self, number: int) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as http:
            while not self._is_over:
                self.num_done += 1
                body = {**self._body, "inputs": [self.num_done % 500 + 5, number + 5, *self._body["inputs"]]}     # no prefix of another
                reply = await http.post(f"{self._url}/generate", json=body)
                assert reply.status_code == 200, reply.text
                assert reply.json()["count_output_tokens"] == body["parameters"]["max_new_tokens"]

    def check(self) -> None:
        for client in self._clients:
            if client.done():
                client.result()

    async def end(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._clients)


def status(url: str) -> dict[str, Any]:
    said = subprocess.run([sys.executable, "-m", "tokenmill", "status", "--url", url, "--json"], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert said.returncode == 0, said.stderr
    report: dict[str, Any] = json.loads(said.stdout)
    return report


async def until_role(url: str, role: str, number: int, load: Load) -> dict[str, Any]:
    give_up_at = time.monotonic() + WAIT_S
    while (report := await asyncio.to_thread(status, url))["roles"][role] < number:
        load.check()
        assert time.monotonic() < give_up_at, json.dumps(report["planner"], indent=2)
        await asyncio.sleep(1.0)
    return report


@pytest.mark.timeout(600)
async def test_the_planner_moves_workers_to_where_they_are_wanted_and_back(tmp_path: Path, tiny_v3: Path) -> None:
    config_port, port = free_ports(2)
    at_config = ["--config_server_host", "127.0.0.1", "--config_server_port", str(config_port)]
    doors, url = f"http://127.0.0.1:{config_port}", f"http://127.0.0.1:{port}"
    with Servings(tmp_path) as farm:
        farm.serve("config", "--run_mode", "config_server", *at_config, "--planner", "act", "--ttft_objective", "0.5",
                   "--tpot_objective", "0.5")
        farm.serve("master", "--run_mode", "pd_master", "--model_dir", str(tiny_v3), "--port", str(port), *at_config)
        for name, role in (("a", "prefill"), ("b", "decode"), ("c", "decode")):
            farm.serve(name, "--run_mode", role, "--model_dir", str(tiny_v3), "--worker_id", name, "--max_total_token_num", "16384",
                       "--chunked_prefill_size", "64", "--running_max_req_size", "4", "--num_threads", "1", *at_config)
        await asyncio.to_thread(farm.wait_ready, url)
        load = Load(url, PROMPTS, 24)
        report = await until_role(doors, "prefill", 2, load)
        await load.end()
        assert report["planner"]["decisions"][0]["role"] == "prefill"
        load = Load(url, ANSWERS, 24)
        report = await until_role(doors, "decode", 2, load)
        await load.end()
        assert next(entry["role"] for entry in report["planner"]["decisions"] if entry["kind"] == "move") == "decode"
