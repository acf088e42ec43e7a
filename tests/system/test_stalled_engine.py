"""An engine that hangs is ended by its I/O process, and its jobs go on elsewhere."""

import json
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services]


def test_the_jobs_of_an_engine_that_hangs_are_finished_by_another_worker(tmp_path: Path, tiny_v3: Path) -> None:
    with Farm(tmp_path, tiny_v3) as farm:
        first = farm.worker("both", "first", "--engine_stall_s", "2")
        farm.rest()
        farm.wait_ready()
        body = {"inputs": [9, 8, 7], "parameters": {"max_new_tokens": 1500, "ignore_eos": True}}
        with httpx.stream("POST", f"{farm.url()}/generate_stream", json=body, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data:"))
            next(lines)
            engine = next(p for p in psutil.Process(first.process.pid).children() if "workers.engine" in p.cmdline())
            engine.send_signal(signal.SIGSTOP)
            farm.worker("both", "second")
            events = [json.loads(line[len("data:"):]) for line in lines]
        assert len(events) == 1499 and events[-1]["finished"]
        assert first.process.wait(30) == 1 and "made no progress for 2 s" in first.log
        assert not engine.is_running()
