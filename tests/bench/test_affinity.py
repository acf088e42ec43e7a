"""The bench of prefix affinity at a small size, on a real fleet."""

from pathlib import Path

import pytest

from bench import affinity

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.chaos, pytest.mark.system, pytest.mark.services]


def test_a_few_conversations_are_served_with_affinity_off_and_on_and_compared_with_a_central_router(tmp_path: Path) -> None:
    size = {"conversations": 8, "turns": 3, "workers": 3, "think_s": 1.0, "spread_s": 2.0, "output_tokens": 4}
    flags = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    model_dir = ROOT / affinity.MODEL_DIR      # its vocabulary is as large as the prompts need it
    found = affinity.run(affinity.parse_arguments(["--model_dir", str(model_dir), "--out", str(tmp_path / "out"), *flags]))
    assert {row.name for row in found} >= {"prefix hit rate, affinity on", "prefix hit rate, affinity on, simulated"}
    assert all((tmp_path / "out").with_suffix(suffix).is_file() for suffix in (".json", ".md", ".png"))
