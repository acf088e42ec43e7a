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
    (["--model_dir", "m"], {"MOE_MODE": "EP"}, "MOE_MODE=EP"), (["--model_dir", "m", "--run_mode", "config_server"], {}, "config_server"),
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


def test_three_processes_as_in_the_guide_answer_together(tmp_path: Path, tiny_v3: Path) -> None:
    master, log = serve(tmp_path, "--run_mode", "pd_master", "--model_dir", str(tiny_v3), "--port", "0", "--state_dir", str(tmp_path / "s"))
    started = [master]
    try:
        url = wait_url(master, log)
        assert httpx.get(f"{url}/readiness").status_code == 503
        port = url.rpartition(":")[2]
        for role in ("prefill", "decode"):
            (tmp_path / role).mkdir()
            started.append(serve(tmp_path / role, "--run_mode", role, "--model_dir", str(tiny_v3), "--pd_master_ip", "127.0.0.1",
                                 "--pd_master_port", port, "--max_total_token_num", "4096", "--disable_cudagraph")[0])
        give_up_at = time.monotonic() + 90
        while httpx.get(f"{url}/readiness").status_code != 200:
            assert time.monotonic() < give_up_at, [(tmp_path / role / "serve.log").read_text() for role in ("prefill", "decode")]
            time.sleep(0.1)
        body = {"inputs": [1, 2, 3], "parameters": {"max_new_tokens": 9, "ignore_eos": True}}
        reply = httpx.post(f"{url}/generate", json=body, timeout=60)
        assert reply.json()["count_output_tokens"] == 9
        asked = [sys.executable, "-m", "tokenmill", "status", "--url", url, "--json"]
        status = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert '"role": "prefill"' in status.stdout and '"role": "decode"' in status.stdout
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            assert process.wait(45) == 0


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
