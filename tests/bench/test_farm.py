"""The farm bench's own logic, against a server with known behaviour and a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from bench import background_figures, farm
from bench.farm_process import FarmFailed, running_farm
from bench.transformers_peer import TransformersPeer
from tests.bench.scripted_server import lightllm_stream, refusal, serving
from workers.random_model import write_random_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), "llama")


def test_every_section_that_asks_one_endpoint_has_a_row_with_a_bar(tiny_model: Path, tmp_path: Path) -> None:
    with serving(lambda number, body: lightllm_stream(body)) as server:
        given = ["--url", server.url.removesuffix("/generate_stream"), "--model_dir", str(tiny_model), "--out", str(tmp_path / "r")]
        status = farm.main([*given, "--rounds", "1", "--num_threads", "1", "--sections", "single", "many", "first"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert status == (0 if all(row["met"] for row in report["rows"]) else 1)
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "single stream vs transformers.generate"
    assert "16 clients vs single stream" in names and "first token of a 512-token prompt" in names
    assert "equal in 0 of 1 rounds" in report["rows"][0]["note"]  # the server makes its ids up, and the report says so
    prompts = [tuple(body["inputs"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts)  # a prefix cache could not help
    assert sorted({len(prompt) for prompt in prompts}) == [64, 512]


def test_a_server_that_refuses_gives_no_figures(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda number, body: refusal(429, "queue full")) as server:
        url = server.url.removesuffix("/generate_stream")
        status = farm.main(["--url", url, "--model_dir", str(tiny_model), "--sections", "many", "--out", str(tmp_path / "r")])
    assert status == 2 and "429" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_the_peer_generates_exactly_as_many_tokens_as_asked_for(tiny_model: Path) -> None:
    threads = torch.get_num_threads()
    peer = TransformersPeer(tiny_model, num_threads=1)
    seconds, ids = peer.generate([5, 6, 7], 20)
    assert len(ids) == 20 and seconds > 0
    assert peer.generate([5, 6, 7], 20)[1] == ids
    assert peer.prefill([5, 6, 7]) > 0
    torch.set_num_threads(threads)


@pytest.mark.system
def test_the_queue_paths_figure_is_taken_from_a_real_farm_and_a_real_engine(tiny_model: Path, tmp_path: Path) -> None:
    status = farm.main(["--sections", "queue", "--model_dir", str(tiny_model), "--queue_requests", "10", "--out", str(tmp_path / "r")])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert status == (0 if all(row["met"] for row in rows) else 1)
    assert [row["unit"] for row in rows] == ["ms", "ms"]
    assert {name: len(samples) for name, samples in rows[0]["samples"].items()} == {"farm_ms": 10, "engine_ms": 10, "http_ms": 10}


@pytest.mark.system
def test_what_a_batch_costs_others_is_taken_from_a_real_farm(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_figures, "ALONE_S", 1.0)
    monkeypatch.setattr(background_figures, "BATCH_LINES", 3000)
    monkeypatch.setattr(farm, "BATCH_REQUESTS", 8)
    status = farm.main(["--sections", "batch", "--model_dir", str(tiny_model), "--rounds", "1", "--out", str(tmp_path / "r")])
    [row] = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert status == (0 if row["met"] else 1)
    assert len(row["samples"]["alone_first_token_s"]) == len(row["samples"]["beside_first_token_s"]) == 8
    assert row["samples"]["batch_tok_s"] > 0


@pytest.mark.services
def test_a_farm_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(FarmFailed, match="nowhere"), running_farm(tmp_path / "nowhere", tmp_path / "state", num_threads=1, ready_s=60):
        pass
