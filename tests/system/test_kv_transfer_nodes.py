"""Prefill on one node, decode on another, with addresses and shared memory of their own: keys and values cross the wire unasked."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system import netns
from tests.system.served import Served
from tests.system.test_nodes import NO_NAMESPACES, TOKEN, Nodes
from tests.system.test_ranks import PROMPTS, greedy

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.chaos]


@pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)
@pytest.mark.timeout(600)
def test_a_decode_worker_on_another_node_fetches_over_the_wire_and_survives_its_loss(tmp_path: Path, tiny_v3: Path) -> None:
    with ExitStack() as stack:
        nodes = stack.enter_context(netns.two_nodes())
        sizes = ["--model_dir", str(tiny_v3), "--max_total_token_num", "16384", "--max_req_total_len", "2048"]
        join = ["--pd_master_ip", nodes[0].address, "--pd_master_port", "8088", *sizes]
        master = stack.enter_context(Served(
            tmp_path / "master", "--run_mode", "pd_master", "--host", nodes[0].address, "--port", "8088", "--insecure", "--state_dir",
            str(tmp_path / "state"), *sizes[:2], environment=TOKEN, prefix=nodes[0].run))
        url = master.url()
        prefill = stack.enter_context(Served(tmp_path / "prefill", "--run_mode", "prefill", *join, environment=TOKEN, prefix=nodes[0].run))
        decode = stack.enter_context(Served(tmp_path / "decode", "--run_mode", "decode", *join, environment=TOKEN,
                                            prefix=[*nodes[1].run, "unshare", "--ipc"]))
        farm = Nodes(nodes, [prefill, decode], url)
        assert farm.answers(PROMPTS, 24) == greedy(tiny_v3, PROMPTS, 24)
        client = farm.ask(PROMPTS[:5], 150)
        assert client.stdout is not None and client.stdout.readline() == "under way\n"
        farm.kill_node_1()
        decode.start()
        assert farm.read(client) == greedy(tiny_v3, PROMPTS[:5], 150)
