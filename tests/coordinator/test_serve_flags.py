"""What `tokenmill serve` is told about engines reaches the worker as it was said, or is refused by name."""

from pathlib import Path

import pytest

from coordinator import serve, serve_flags
from coordinator.errors import ConfigError


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def worker_args(model_dir: str, *flags: str) -> list[str]:
    return serve._worker_args(serve_flags.parse(["--model_dir", model_dir, *flags], {}), "both")


def value_of(args: list[str], flag: str) -> str:
    return args[args.index(flag) + 1]


def test_the_device_is_left_to_the_worker_unless_it_is_said(model_dir: str) -> None:
    assert value_of(worker_args(model_dir), "--device") == "auto"
    for device in ("auto", "cpu", "cuda", "cuda:3"):
        assert value_of(worker_args(model_dir, "--device", device), "--device") == device
    for device in ("gpu", "cuda:", "cuda:x", "cpu:0"):
        with pytest.raises(ConfigError, match=f"--device {device}"):
            worker_args(model_dir, "--device", device)


@pytest.mark.parametrize(("flag", "value"), [
    ("--graph_max_batch_size", "64"), ("--page_size", "32"), ("--max_total_token_num", "6400"), ("--chunked_prefill_size", "2048"),
    ("--mem_fraction", "0.5"), ("--mem_fraction", "0.0"), ("--running_max_req_size", "7"), ("--engine_stall_s", "9.5"),
    ("--graph_max_batch_size", "0"), ("--data_type", "bf16"),
])
def test_sizes_are_passed_on_as_they_were_said_also_wrong_ones(model_dir: str, flag: str, value: str) -> None:
    assert value_of(worker_args(model_dir, flag, value), flag) == value


def test_switches_are_passed_on_when_they_are_set(model_dir: str) -> None:
    switches = ["--disable_cudagraph", "--enable_fa3", "--disable_dynamic_prompt_cache"]
    assert not set(switches) & set(worker_args(model_dir))
    assert set(switches) <= set(worker_args(model_dir, *switches))


@pytest.mark.parametrize(("flags", "p2p", "value"), [
    ([], "", "auto"), ([], "1", "auto"), ([], "0", "collective"), (["--kv_transfer", "mapped"], "1", "mapped"),
    (["--kv_transfer", "collective"], "0", "collective"), (["--kv_transfer", "auto"], "0", "auto"),
])
def test_the_way_of_hand_overs_is_said_by_a_flag_or_as_lightllm_says_it(model_dir: str, flags: list[str], p2p: str, value: str) -> None:
    parsed = serve_flags.parse(["--model_dir", model_dir, *flags], {"KV_TRANS_USE_P2P": p2p} if p2p else {})
    assert value_of(serve._worker_args(parsed, "decode"), "--kv_transfer") == value


@pytest.mark.parametrize(("flags", "p2p", "text"), [
    ([], "yes", "KV_TRANS_USE_P2P='yes'"),
    (["--kv_transfer", "collective"], "1", "KV_TRANS_USE_P2P=1 contradicts --kv_transfer collective"),
    (["--kv_transfer", "mapped"], "0", "KV_TRANS_USE_P2P=0 contradicts --kv_transfer mapped"),
])
def test_two_ways_at_once_are_refused(model_dir: str, flags: list[str], p2p: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        serve_flags.parse(["--model_dir", model_dir, *flags], {"KV_TRANS_USE_P2P": p2p})


@pytest.mark.parametrize(("flags", "text"), [(["--engine_stall_s", "-1"], "--engine_stall_s"), (["--enable_mps"], "--enable_mps")])
def test_what_cannot_be_is_refused_by_name(model_dir: str, flags: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        worker_args(model_dir, *flags)


def test_an_address_that_is_not_loopback_needs_a_file_of_keys_that_exists(model_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--host 0.0.0.0: not a loopback address: give --api_keys_file"):
        worker_args(model_dir, "--host", "0.0.0.0")
    with pytest.raises(ConfigError, match=r"--api_keys_file .*: there is no such file"):
        worker_args(model_dir, "--api_keys_file", str(tmp_path / "missing"))
    (tmp_path / "keys.json").write_text('{"keys": []}')
    assert worker_args(model_dir, "--host", "0.0.0.0", "--api_keys_file", str(tmp_path / "keys.json"))


def test_costs_of_a_mock_engine_are_refused_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--mock_costs"):
        serve_flags.parse(["--model_dir", str(tmp_path), "--mock_costs", "prefill=1"])
    assert serve_flags.parse(["--model_dir", str(tmp_path), "--engine", "mock", "--mock_costs", "prefill=1"]).engine == "mock"
