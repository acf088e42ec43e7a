"""`tokenmill serve` as a user meets it: starts, answers, says what is wrong, and leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.system.serving import Servings, free_ports

pytestmark = [pytest.mark.system, pytest.mark.services]

ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(r"ready: (http://[^\s]+)")
MODEL = "THE MODEL"      # stands for a folder that is one


def serve(tmp_path: Path, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "tokenmill", "serve", *flags], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
    return process, log


def wait_url(process: subprocess.Popen[bytes], log: Path) -> str:
    give_up_at = time.monotonic() + 90
    while not (found := READY.search(log.read_text())):
        assert process.poll() is None and time.monotonic() < give_up_at, log.read_text()
        time.sleep(0.05)
    return found[1]


def wait_gone(pids: list[int], timeout_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]):
        assert time.monotonic() < give_up_at, [psutil.Process(pid).cmdline() for pid in left]
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "sigkill"])
def test_whatever_ends_the_farm_no_process_and_no_port_stays(tmp_path: Path, tiny_v3: Path, number: signal.Signals) -> None:
    process, log = serve(tmp_path, "--model-dir", str(tiny_v3), "--port=0", "--state_dir", str(tmp_path / "s"),
                         "--max_total_token_num", "4096")
    url = wait_url(process, log)
    body = {"inputs": [5, 6], "parameters": {"max_new_tokens": 17, "frequency_penalty": 1, "ignore_eos": True}}
    reply = httpx.post(f"{url}/generate", json=body, timeout=60)
    assert reply.status_code == 200 and reply.json()["count_output_tokens"] == 17 and len(reply.json()["generated_text"]) == 1
    family = psutil.Process(process.pid).children(recursive=True)
    ports = [c.laddr.port for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(ports) >= 3  # REST, NATS, Valkey
    process.send_signal(number)
    process.wait(30)
    wait_gone([p.pid for p in family])
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    if number is signal.SIGINT:
        assert process.returncode == 0


@pytest.mark.parametrize(("flags", "environment", "said"), [
    (["--model_dir", "m", "--tp", "8", "--dp", "3"], {}, "--dp 3"), (["--model_dir", "m", "--enable-mps"], {}, "--enable_mps"),
    (["--model_dir", "m"], {"MOE_MODE": "XP"}, "MOE_MODE=XP"),
    (["--run_mode", "config_server", "--host", "0.0.0.0"], {}, "cluster token"),
    (["--run_mode", "config_server"], {"TOKENMILL_CLUSTER_TOKEN": "short"}, "at least 16"),
    (["--run_mode", "decode", "--pd_master_ip", "a", "--config_server_host", "b"], {}, "--config_server_host and --pd_master_ip"),
    (["--run_mode", "config_server", "--tls_cert", "c.pem"], {}, "--tls_key"), (["--join", "a:1", "--model_dir", MODEL], {}, "--join"),
    (["--run_mode", "pd_master", "--host", "0.0.0.0", "--model_dir", MODEL], {}, "keeps the queue"),
    (["--model_dir", MODEL, "--host", "0.0.0.0"], {}, "--insecure"), (["--model_dir", "m", "--run_mode", "prefill"], {}, "--pd_master_ip"),
    (["--model_dir", "m"], {"LOADWORKER": "many"}, "LOADWORKER"), ([], {}, "--model_dir"),
    (["--model_dir", "m", "--enable_decode_microbatch_overlap"], {}, "--enable_decode_microbatch_overlap"),
    (["--model_dir", "m", "--nats_url", "nats://x"], {}, "--redis_url"), (["--model_dir", "/no/such/dir"], {}, "/no/such/dir"),
])
def test_a_flag_that_cannot_be_honoured_is_refused_by_name_before_anything_starts(flags: list[str], environment: dict[str, str], said: str,
                                                                                         tiny_v3: Path) -> None:
    flags = [str(tiny_v3) if flag == MODEL else flag for flag in flags]
    ran = subprocess.run([sys.executable, "-m", "tokenmill", "serve", *flags], cwd=ROOT, capture_output=True, text=True, timeout=60,
                         env={**os.environ, **environment})
    assert ran.returncode == 2 and said in ran.stderr


def test_a_flag_that_the_machine_cannot_honour_ends_the_start_with_what_is_missing(tmp_path: Path, tiny_v3: Path) -> None:
    process, log = serve(tmp_path, "--model_dir", str(tiny_v3), "--port", "0", "--state_dir", str(tmp_path / "s"), "--device", "cpu",
                         "--enable_fa3")
    assert process.wait(60) == 1
    assert "--enable_fa3: Flash Attention 3 needs a Hopper GPU, and the device is the CPU" in log.read_text()


def test_a_port_that_is_taken_is_said_at_once(tmp_path: Path, tiny_v3: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process, log = serve(tmp_path, "--model_dir", str(tiny_v3), "--port", port, "--state_dir", str(tmp_path / "s"))
        assert process.wait(30) == 2
    assert f"--port {port}" in log.read_text()


def test_the_guides_three_processes_answer_together_also_after_master_and_queue_were_killed(tmp_path: Path, tiny_v3: Path) -> None:
    port = free_ports(1)[0]
    environment = {"TOKENMILL": f"{sys.executable} -m tokenmill", "MODEL_DIR": str(tiny_v3), "TP": "1", "DP": "1",
                   "PD_MASTER_PORT": str(port)}
    body = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 9, "ignore_eos": True}}
    with Servings(tmp_path, environment) as farm:
        master = farm.script("master", "single_pd_master/pd_master.sh", "127.0.0.1")
        for role in ("prefill", "decode"):
            farm.script(role, f"single_pd_master/pd_{role}.sh", "127.0.0.1", "127.0.0.1", flags="--max_total_token_num 4096")
        url = f"http://127.0.0.1:{port}"
        master.wait_said("pd_master ready")
        farm.wait_ready(url)
        reply = httpx.post(f"{url}/generate", json=body, timeout=60)
        assert reply.json()["count_output_tokens"] == 9
        asked = [sys.executable, "-m", "tokenmill", "status", "--url", url, "--json"]
        status = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert '"role": "prefill"' in status.stdout and '"role": "decode"' in status.stdout
        master.kill_all()           # the keeper, NATS and Valkey with it: they come back on the same ports, and the workers reconnect
        master.start()
        master.wait_said("pd_master ready", 2)
        farm.wait_ready(url)
        assert httpx.post(f"{url}/generate", json=body, timeout=60).json()["generated_text"] == reply.json()["generated_text"]


def test_a_second_ctrl_c_ends_at_once_what_the_first_lets_finish(tmp_path: Path, tiny_v3: Path) -> None:
    process, log = serve(tmp_path, "--model_dir", str(tiny_v3), "--port", "0", "--state_dir", str(tmp_path / "s"),
                         "--max_total_token_num", "8192", "--drain_timeout", "600")
    url = wait_url(process, log)
    body = {"inputs": [5, 6], "parameters": {"max_new_tokens": 2400, "ignore_eos": True}}
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=60) as response:
        next(response.iter_lines())
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        give_up_at = time.monotonic() + 30
        while "once more" not in log.read_text():
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    wait_gone([p.pid for p in family])
