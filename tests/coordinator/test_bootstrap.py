"""Whom a process asks for its queue, and what it makes of the answers."""

import pytest

from coordinator import serve_flags
from coordinator.bootstrap import _first_answer, addresses
from coordinator.errors import ConfigError, Unavailable
from coordinator.serve_queue import doors


def test_hosts_may_bring_ports_of_their_own() -> None:
    assert addresses("a, b:7000,10.0.0.1", (60088,)) == ("a:60088", "b:7000", "10.0.0.1:60088")
    assert addresses("::1,[::1]:9", (1, 2)) == ("[::1]:1", "[::1]:2", "[::1]:9")


def test_a_pd_master_without_a_port_is_looked_for_where_it_usually_is(tmp_path: pytest.TempPathFactory) -> None:
    (tmp_path / "config.json").write_text("{}")  # type: ignore[operator]
    worker = ["--run_mode", "prefill", "--model_dir", str(tmp_path), "--pd_master_ip", "10.1.1.1"]
    assert doors(serve_flags.parse(worker, {})).addresses == ("10.1.1.1:1212", "10.1.1.1:60011", "10.1.1.1:8000")
    assert doors(serve_flags.parse([*worker, "--pd_master_port", "7"], {})).addresses == ("10.1.1.1:7",)


def test_the_first_door_that_answers_is_taken_and_a_refusal_counts_only_if_none_does() -> None:
    def away() -> dict[str, str]:
        raise Unavailable("nobody there")

    def refuses() -> dict[str, str]:
        raise ConfigError("the wrong token")

    assert _first_answer([away, refuses, lambda: {"nats_url": "n"}])[0] == {"nats_url": "n"}
    assert _first_answer([away, away]) == (None, ["nobody there", "nobody there"])
    with pytest.raises(ConfigError, match="the wrong token"):
        _first_answer([away, refuses])
