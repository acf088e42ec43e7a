"""docs/operations.md as a newcomer meets it: its first section, pasted block by block into one shell."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import kept_queue
from coordinator.queue_record import FILE, read_record
from tests.system.farm import ROOT

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.chaos]

TIMEOUT_S = 420


def blocks() -> list[str]:
    page = (ROOT / "docs/operations.md").read_text().partition("\n## The processes")[0]
    return re.findall(r"^```sh\n(.*?)^```", page, re.S | re.M)


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_the_fleet_of_the_page_comes_up_survives_and_ends(tmp_path: Path) -> None:
    """In a folder of its own, which has only what the page needs: the model, the environment and a way to the code."""
    model = ROOT / "models"
    if not (model / "smollm2-135m-instruct/config.json").is_file():
        pytest.skip("the demo model is not there: make serve fetches it")
    (tmp_path / "models").symlink_to(model.resolve())
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    script = "set -eo pipefail\n" + "\n".join(f"echo '--- block {number}'\n{block}" for number, block in enumerate(blocks()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "output"
    with log.open("wb") as output:
        # -m: job control as in a terminal, for `%1` and `jobs -p`.
        shell = subprocess.Popen(["bash", "-m", "-c", script], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                 env=environment, start_new_session=True)
        try:
            status = shell.wait(TIMEOUT_S)
        finally:
            _end_what_is_left(shell.pid, tmp_path)
    said = log.read_text()
    assert status == 0, said
    assert said.count('"count_output_tokens":17') == 2 and '"count_output_tokens":8' in said
    assert "adopted" in said and "is decode now" in said and "is prefill now" in said and "has left" in said, said


def _end_what_is_left(session: int, folder: Path) -> None:
    for line in subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True).stdout.splitlines()[1:]:
        pid, sid = map(int, line.split())
        if sid == session:
            os.kill(pid, signal.SIGTERM)
    for path in folder.rglob(FILE):
        if (record := read_record(path)) is not None:
            kept_queue.stop(record.pid, path.parent)
