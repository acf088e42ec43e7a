"""Existing clients, unmodified, against a live farm: each runs a script of this folder in a process of its own.

TOKENMILL_CLIENTS_PYTHON names another interpreter for them: litellm wants older packages than the farm itself.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.farm import Farm
from workers.demo_model import fetch_demo

pytestmark = [pytest.mark.clients, pytest.mark.system, pytest.mark.services, pytest.mark.timeout(600)]

FOLDER = Path(__file__).parent
MODEL = "demo"
PYTHON = os.environ.get("TOKENMILL_CLIENTS_PYTHON", sys.executable)
LIMIT_S = 280


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """The demo model, disaggregated."""
    model_dir = fetch_demo(FOLDER.parents[1] / "models" / "smollm2-135m-instruct")
    with Farm(tmp_path_factory.mktemp("clients"), model_dir, model=MODEL) as started:
        started.worker("prefill", "prefill-1")
        started.worker("decode", "decode-1")
        started.rest("rest", "--files_dir", str(tmp_path_factory.mktemp("files")), wait=False)
        started.wait_ready()
        yield started


@pytest.mark.parametrize(("script", "package"), [
    ("use_openai.py", "openai"), ("use_requests.py", "requests"), ("use_litellm.py", "litellm"), ("use_langchain.py", "langchain_openai")])
def test_an_existing_client_works_unchanged(farm: Farm, script: str, package: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"]).returncode:
        pytest.skip(f"{package} is not installed for {PYTHON}")
    where = {"OPENAI_BASE_URL": f"{farm.url()}/v1", "OPENAI_API_KEY": "none", "MODEL": MODEL, "LANGSMITH_TRACING": "false",
             "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run([PYTHON, FOLDER / script], env={**os.environ, **where}, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{farm.logs()[-3000:]}"


async def test_nothing_is_held_after_the_clients(farm: Farm) -> None:
    await farm.wait_at_rest()
