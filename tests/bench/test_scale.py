"""The scale bench at a small size: the farm it starts is real, its leader is killed, every token is checked."""

import uuid
from pathlib import Path

import pytest

from bench import scale
from bench.scale_figures import Answered, ScaleRun, rows
from workers.random_model import write_random_model


def job_id(at_s: float) -> str:
    return str(uuid.UUID(int=int(at_s * 1000) << 80))


def test_what_is_lost_wrong_or_slow_around_the_kill_is_counted() -> None:
    jobs = [Answered(job_id=job_id(100.0 + n), sent_s=100.0 + n, latency_s=3.0 if n == 5 else 0.5, claimed_s=100.25 + n) for n in range(30)]
    run = ScaleRun(jobs=jobs, num_sent=32, num_failed=2, num_wrong=1, num_records=30, seconds=30.0, wanted_rate=1.0, redis_commands=120,
                   redis_inner=900, coordinator_cpu_s=0.6, killed_at=104.5)
    found = {row.name: row for row in rows(run)}
    assert found["jobs lost"].figure == 2 and not found["jobs lost"].is_met
    assert found["answers with a missing, doubled or wrong token"].figure == 1
    assert found["final records beyond one per job"].is_met
    assert found["claim latency p99"].figure == pytest.approx(250.0, abs=1.0)
    assert found["Redis commands per job"].figure == 4
    assert found["added by the leader's death"].figure == pytest.approx(2.5)


@pytest.mark.system
@pytest.mark.services
@pytest.mark.parametrize("through", ["client", pytest.param("rest", marks=pytest.mark.chaos)])
def test_a_small_fleet_answers_every_job_though_its_leading_coordinator_is_killed(through: str, tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", "llama", seed=1)
    out = tmp_path / "scale"
    size = {"workers": 8, "fleets": 2, "masters": 2, "coordinators": 2, "rate": 20, "seconds": 3, "prompt_tokens": 12}
    flags = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    assert scale.main(["--model_dir", str(model_dir), "--through", through, "--out", str(out), "--mock_costs", "step_ms=5", *flags]) == 0
    figures = {row["name"]: row["figure"] for row in scale.read_rows(out)}
    assert figures["jobs lost"] == figures["answers with a missing, doubled or wrong token"] == 0
    assert figures["final records beyond one per job"] == 0
