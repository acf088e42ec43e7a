"""The clock of decode steps."""

import pytest

from workers import step_clock
from workers.step_clock import StepClock


def test_only_pauses_between_steps_of_the_same_sequences_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: now[0])
    clock = StepClock()
    assert clock.step_s == 0.0
    for goes_on in (True, True, False):
        clock.tick(goes_on)
        now[0] += 0.02
    now[0] += 5.0                       # nothing ran
    clock.tick(True)
    assert clock.step_s == pytest.approx(0.02)
    now[0] += 0.12
    clock.tick(False)
    assert clock.step_s == pytest.approx(0.03)
    now[0] += 30.0
    assert clock.step_s == 0.0
