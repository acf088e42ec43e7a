"""CUDA's multi-process service: whether kernels of several processes run on a GPU side by side. Only looked for; nothing is started.

Without it, two processes on one GPU take turns: a copy then waits for the other's time slice. Processes that start while the daemon
runs use it by themselves.
"""

import os
from collections.abc import Mapping
from pathlib import Path

DEFAULT_FOLDER = "/tmp/nvidia-mps"
CONTROL, PID_FILE = "control", "nvidia-cuda-mps-control.pid"


def daemon_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The pipe folder of a running daemon that CUDA would use here; None if there is none."""
    folder = Path(environment.get("CUDA_MPS_PIPE_DIRECTORY") or DEFAULT_FOLDER)
    try:
        if not (folder / CONTROL).exists():
            return None
        pid_file = folder / PID_FILE
        if pid_file.exists():
            return folder if Path(f"/proc/{int(pid_file.read_text().split()[0])}").exists() else None  # else left behind by a dead one
        return folder
    except (OSError, ValueError, IndexError):
        return None
