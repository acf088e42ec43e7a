"""The load client against a server with known behaviour: what it sends, what it counts, what it prints."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import Response

from bench.benchmark_client import main
from bench.workload import make_workload, vocab_size_of
from tests.bench.scripted_server import Answer, Scripted, lightllm_stream, openai_stream, refusal, serving

Serve = Callable[[Answer], Scripted]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:
        yield lambda answer: stack.enter_context(serving(answer))


def run_client(url: str, *extra: str) -> int:
    return main(["--url", url, "--num_clients", "4", "--input_num", "12", "--input_len", "37", "--output_len", "5", *extra])


def test_prompts_have_exactly_the_length_that_was_asked_for(serve: Serve) -> None:
    server = serve(lambda number, body: lightllm_stream(body))
    assert run_client(server.url) == 0
    assert len(server.bodies) == 12
    assert {len(body["inputs"]) for body in server.bodies} == {37}
    assert all(512 <= token <= 8192 for body in server.bodies for token in body["inputs"])
    assert all(2 <= body["parameters"]["max_new_tokens"] <= 10 for body in server.bodies)
    assert all(body["parameters"]["ignore_eos"] and not body["parameters"]["do_sample"] for body in server.bodies)


def test_never_more_requests_are_under_way_than_there_are_clients(serve: Serve) -> None:
    server = serve(lambda number, body: lightllm_stream(body))
    assert run_client(server.url, "--input_num", "40", "--num_clients", "3") == 0
    assert 1 <= server.most_at_once <= 3


def test_refusals_are_counted_and_the_rest_goes_on(serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def answer(number: int, body: dict[str, Any]) -> Response:
        if number == 0:
            return refusal(429, "queue full", **{"Retry-After": "0"})
        return refusal(400, "inputs: bad") if number in (3, 4) else lightllm_stream(body)

    server = serve(answer)
    assert run_client(server.url, "--dump_file", str(tmp_path / "dump.json")) == 1
    assert len(server.bodies) == 12
    printed = capsys.readouterr().out
    assert "valid num = 9; all data num = 12; valid ratio = 0.75" in printed
    assert "queue full" in printed and "2 × " in printed
    dump = json.loads((tmp_path / "dump.json").read_text())
    assert dump["statuses"] == {"200 valid": 9, "400": 2, "429": 1}
    assert dump["settings"]["input_len"] == 37


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"cut": 1}, "asked for"),
        ({"wrong_count_at": 0}, "count_output_tokens 2"),
        ({"reason": "stop"}, "finish_reason is 'stop'"),
    ],
)
def test_a_stream_with_a_fault_is_answered_200_but_not_valid(
    serve: Serve, capsys: pytest.CaptureFixture[str], fault: Any, told: str
) -> None:
    server = serve(lambda number, body: lightllm_stream(body, **(fault if number == 5 else {})))
    assert run_client(server.url) == 1
    printed = capsys.readouterr().out
    assert "valid num = 11; all data num = 12" in printed
    assert "200 invalid stream" in printed and told in printed


def test_an_error_inside_of_a_stream_is_shown(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(lambda number, body: Response('data:{"message":"worker lost"}\n\n', media_type="text/event-stream"))
    assert run_client(server.url) == 1
    assert "event 1 has no token" in capsys.readouterr().out


def test_no_server_at_all_is_reported_not_raised(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert run_client(f"http://127.0.0.1:{port}/generate_stream") == 1
    printed = capsys.readouterr().out
    assert "valid num = 0" in printed and "no answer" in printed and "ConnectionRefused" in printed


def test_a_server_that_hangs_up_in_mid_answer_counts_as_no_answer(capsys: pytest.CaptureFixture[str], serve: Serve) -> None:
    short = Response(b"data:", headers={"Content-Length": "5000"})  # uvicorn closes the connection when the body falls short
    short.headers["content-length"] = "5000"
    server = serve(lambda number, body: short if number == 2 else lightllm_stream(body))
    assert run_client(server.url) == 1
    printed = capsys.readouterr().out
    assert "valid num = 11" in printed and "no answer" in printed


def test_openai_completions_are_read_by_usage(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(lambda number, body: openai_stream(body))
    assert run_client(server.url.replace("/generate_stream", "/v1/completions"), "--server_api", "openai", "--model", "m") == 0
    assert "valid num = 12" in capsys.readouterr().out
    assert all(len(body["prompt"]) == 37 and body["stream"] and body["ignore_eos"] and body["model"] == "m" for body in server.bodies)


def test_the_printed_lines_are_the_seed_clients(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(lambda number, body: lightllm_stream(body))
    run_client(server.url)
    printed = capsys.readouterr().out
    for line in (r"Total QPS: [\d.]+", r"Avg Input Length: 37\.0", r"Avg Output Length: [\d.]+", r"Total Throughput: [\d.]+ token/s",
                 r"Input Throughput: [\d.]+ token/s", r"Output Throughput: [\d.]+ token/s"):  # fmt: skip
        assert re.search(f"^{line}$", printed, re.MULTILINE), line
    for percent in (25, 50, 75, 90, 95, 99, 100):
        assert re.search(rf"^request_time P{percent}: [\d.]+s$", printed, re.MULTILINE)
        assert re.search(rf"^first_token_time P{percent}: [\d.]+s$", printed, re.MULTILINE)
        assert re.search(rf"^decode_token_time P{percent}: [\d.]+ms$", printed, re.MULTILINE)


def test_it_runs_as_a_file_from_a_clone_and_takes_dashes(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda number, body: lightllm_stream(body))
    command = [sys.executable, str(ROOT / "bench" / "benchmark_client.py"), "--url", server.url, "--input-num=3", "--output-len", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "valid num = 3" in ran.stdout
    assert {len(body["inputs"]) for body in server.bodies} == {1024}


def test_a_workload_is_its_seeds_and_stays_inside_of_the_vocabulary(tmp_path: Path) -> None:
    assert make_workload(5, 8, 16, seed=3) == make_workload(5, 8, 16, seed=3) != make_workload(5, 8, 16, seed=4)
    small = make_workload(50, 64, 16, vocab_size=300)
    assert all(150 <= token < 300 for item in small for token in item.prompt_ids)
    lengths = [item.output_len for item in make_workload(4000, 1, 128)]
    assert min(lengths) == 2 and max(lengths) == 256
    assert 120 < sum(lengths) / len(lengths) < 138  # clipping on both sides keeps the mean at 129
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    assert vocab_size_of(tmp_path) == 77
    with pytest.raises(FileNotFoundError):
        vocab_size_of(tmp_path / "nothing")
