"""Several nodes serve as one farm by the guide's commands; a node that is lost costs a pause, and no token."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.system import netns
from tests.system.served import ROOT, Served
from tests.system.test_ranks import PROMPTS, greedy

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.chaos]

NO_NAMESPACES = netns.why_not()
TOKEN = {"TOKENMILL_CLUSTER_TOKEN": "a secret of sixteen characters and more"}

# A client on node 0: the tests themselves run in neither network.
CLIENT = """
import asyncio, json, sys
from tests.system.test_ranks import stream
url, number, *prompts = sys.argv[1:]

async def main():
    under_way = asyncio.Event()
    streams = [asyncio.create_task(stream(url, json.loads(prompt), int(number), under_way)) for prompt in prompts]
    await under_way.wait()
    print("under way", flush=True)
    print(json.dumps(await asyncio.gather(*streams)), flush=True)

asyncio.run(main())
"""


class Nodes:
    """The two halves of a farm, and clients on node 0."""

    def __init__(self, nodes: tuple[netns.Node, netns.Node], served: list[Served], url: str) -> None:
        self.nodes, self.served, self.url = nodes, served, url

    def ask(self, prompts: list[list[int]], number: int) -> "subprocess.Popen[str]":
        argv = [*self.nodes[0].run, sys.executable, "-c", CLIENT, self.url, str(number), *map(json.dumps, prompts)]
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def answers(self, prompts: list[list[int]], number: int) -> list[list[int]]:
        return self.read(self.ask(prompts, number))

    def read(self, client: "subprocess.Popen[str]") -> list[list[int]]:
        assert client.stdout is not None
        with client:
            lines = client.stdout.read().splitlines()
        assert lines and client.returncode == 0, self.log
        answers: list[list[int]] = json.loads(lines[-1])
        return answers

    @property
    def log(self) -> str:
        return "\n".join(f"--- node {index}\n{served.log[-6000:]}" for index, served in enumerate(self.served))

    def kill_node_1(self) -> None:
        """As a power cut: every process of it at once, none gets to say a word."""
        root = psutil.Process(self.served[1].process.pid)
        family = [*root.children(recursive=True), root]
        for process in family:
            process.suspend()
        for process in family:
            process.kill()
        self.served[1].process.wait()


    def kill_serve_of_node_0(self) -> None:
        """SIGKILL to `serve` alone: what it started ends by itself, but for the queue and its keeper."""
        family = psutil.Process(self.served[0].process.pid).children(recursive=True)
        own = [process for process in family if any(part.startswith(("workers.", "producers.")) for part in process.cmdline())]
        self.served[0].process.kill()
        self.served[0].process.wait()
        _, alive = psutil.wait_procs(own, timeout=30)
        assert not alive, alive


@contextmanager
def farm_of_two(folder: Path, script: str, environment: dict[str, str]) -> Iterator[Nodes]:
    """The guide's commands, with sizes for this machine."""
    with ExitStack() as stack:
        nodes = stack.enter_context(netns.two_nodes())
        served = []
        for index, node in enumerate(nodes):
            own = folder / f"node-{index}"
            served.append(stack.enter_context(Served(
                own, "--num_threads", "1", "--log_level", "info", "--state_dir", str(own / "state"), "--max_total_token_num", "16384",
                "--max_req_total_len", "2048", environment={**TOKEN, **environment}, prefix=node.run,
                script=(f"multi_node/{script}_node{index}.sh", nodes[0].address))))
        yield Nodes(nodes, served, served[0].url())


@pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("script", "environment", "loss"), [
    ("multi_node_tp", {"TP": "2"}, "killed"), ("multi_node_ep", {"TP": "4", "DP": "4"}, "unplugged"),
], ids=["2.1 multi-node TP, node 1 killed", "2.2 multi-node EP, node 1 unplugged"])
def test_two_nodes_answer_as_one_and_a_node_that_is_lost_costs_no_token(tmp_path: Path, tiny_v3: Path, script: str,
                                                                           environment: dict[str, str], loss: str) -> None:
    with farm_of_two(tmp_path, script, {"MODEL_DIR": str(tiny_v3), "LOADWORKER": "2", **environment}) as farm:
        assert farm.answers(PROMPTS, 24) == greedy(tiny_v3, PROMPTS, 24)
        client = farm.ask(PROMPTS[:5], 150)
        assert client.stdout is not None and client.stdout.readline() == "under way\n"
        farm.kill_node_1() if loss == "killed" else farm.nodes[1].plug(is_in=False)
        give_up_at = time.monotonic() + 60
        while "vanished" not in farm.served[0].log:
            assert time.monotonic() < give_up_at, farm.log
            time.sleep(0.1)
        farm.served[1].start() if loss == "killed" else farm.nodes[1].plug(is_in=True)
        assert farm.read(client) == greedy(tiny_v3, PROMPTS[:5], 150)
        assert farm.answers([[5]], 12) == greedy(tiny_v3, [[5]], 12)
        if loss == "killed":
            farm.kill_serve_of_node_0()
            farm.served[0].start()
            farm.served[0].wait_said("tokenmill ready", 2)
            assert farm.answers(PROMPTS[:2], 12) == greedy(tiny_v3, PROMPTS[:2], 12)
