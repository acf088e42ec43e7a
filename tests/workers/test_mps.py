"""A running multi-process service is found where CUDA looks for it; what a dead one left behind is not taken for one."""

import os
from pathlib import Path

import pytest

from workers.mps import CONTROL, PID_FILE, daemon_folder


@pytest.mark.parametrize(("pid", "is_found"), [(str(os.getpid()), True), ("999999999", False), (None, True), ("garbage", False)],
                         ids=["running", "dead", "no file", "garbage"])
def test_a_running_daemon_is_found_and_a_dead_one_is_not(tmp_path: Path, pid: str | None, is_found: bool) -> None:
    (tmp_path / CONTROL).touch()
    if pid is not None:
        (tmp_path / PID_FILE).write_text(f"{pid}\n")
    assert daemon_folder({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}) == (tmp_path if is_found else None)


def test_without_a_control_pipe_there_is_none(tmp_path: Path) -> None:
    assert daemon_folder({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}) is None
    assert daemon_folder({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "nowhere")}) is None
