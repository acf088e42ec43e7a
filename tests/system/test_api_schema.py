"""schemathesis against a live farm: whatever the schema allows, and what it forbids, no 5xx and no undocumented status."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.farm import Farm

pytestmark = [pytest.mark.system, pytest.mark.services, pytest.mark.chaos]

LEAST_CASES = 2000
CHECKS = ("not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection,"
          "unsupported_method")
# 408: HTTP has no way to refuse an unknown header, and the job of such a case may run into a deadline of microseconds.
CONFIG = "[checks]\nnegative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 408, 413, 429]\n"


def test_two_thousand_requests_by_the_schema_meet_no_server_error_and_no_undocumented_answer(tiny_v3: Path, tmp_path: Path) -> None:
    with Farm(tmp_path / "farm", tiny_v3) as farm:
        farm.worker("both")
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        url = farm.rest("rest", "--max_req_total_len", "128")
        farm.wait_ready()
        run = subprocess.run(
            [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", "150",
             "--seed", "1", "--request-timeout", "60", "--continue-on-failure", "--no-color", "--warnings", "off"],
            cwd=tmp_path, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=1500)
    print(run.stdout[-6000:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    cases = re.search(r"([\d,]+) generated", run.stdout)
    assert cases is not None and int(cases[1].replace(",", "")) >= LEAST_CASES
