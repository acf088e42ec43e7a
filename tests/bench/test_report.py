"""Figures beside their bars."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.machine import describe_machine, machine_line
from bench.report import Row, render_markdown, render_table, write_report

FAST = Row(name="speed", figure=12.0, bar=10.0, unit="tok/s", higher_is_better=True, note="a | b", samples={"tok_s": [11.0, 13.0]})
SLOW = Row(name="delay", figure=4.0, bar=3.0, unit="ms", higher_is_better=False)
MACHINE = {"cpu": "Abacus 9", "cores": "2", "torch": "2.13"}


def test_a_ratio_above_one_is_better_whichever_way_the_figure_counts() -> None:
    assert FAST.is_met and FAST.ratio == pytest.approx(1.2)
    assert not SLOW.is_met and SLOW.ratio == pytest.approx(0.75)
    assert Row(name="even", figure=3.0, bar=3.0, unit="ms", higher_is_better=False).is_met


def test_a_figure_of_nothing_needs_no_finite_ratio() -> None:
    free = Row(name="free", figure=-0.1, bar=3.0, unit="ms", higher_is_better=False)
    assert free.is_met and free.to_json()["ratio"] is None


def test_the_table_shows_figure_bar_and_what_is_not_met() -> None:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render_table("t", [FAST, SLOW]))
    text = captured.get()
    assert "12.00 tok/s" in text and "≥ 10 tok/s" in text and "1.20×" in text
    assert "≤ 3 ms" in text and "NO" in text


def test_the_report_is_written_as_json_markdown_and_picture(tmp_path: Path) -> None:
    written = write_report(tmp_path / "new" / "out", "a title", [FAST, SLOW], MACHINE)
    assert [path.name for path in written] == ["out.json", "out.md", "out.png"]
    report = json.loads(written[0].read_text())
    assert report["machine"] == MACHINE
    assert [row["met"] for row in report["rows"]] == [True, False]
    assert report["rows"][0]["samples"] == {"tok_s": [11.0, 13.0]}
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_markdown_keeps_its_columns_whatever_a_note_says() -> None:
    lines = render_markdown("a title", [FAST, SLOW], MACHINE).splitlines()
    assert lines[0] == "# a title" and "Abacus 9, 2 cores, torch 2.13" in lines
    assert lines[-2].replace("\\|", "").count("|") == lines[-1].count("|") == 7


def test_the_machine_line_names_cpu_cores_and_torch() -> None:
    machine = describe_machine()
    assert int(machine["cores"]) >= 1
    assert f"{machine['cores']} cores" in machine_line(machine) and f"torch {machine['torch']}" in machine_line(machine)
