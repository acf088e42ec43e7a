"""The engine bench's loop and figures with an executor that draws tokens at random: everything but the model."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import engine, engine_figures
from bench.engine_figures import Bench, EngineFigure
from bench.engine_loop import Prompts
from bench.engine_report import EngineReport
from bench.roofline import Ceilings
from bench.shapes import named_config
from workers.batch import ForwardBatch
from workers.model_config import ModelConfig
from workers.sequence import Sequence

CONFIG = ModelConfig.parse(named_config("v2-lite"))
SLOW = Ceilings(bytes_per_s=1e18, bf16_flops=1e21, launch_s=0.0)  # so that no measurement is better than the floor


@dataclass
class DrawnFlight:
    ids: list[int]

    def result(self) -> tuple[list[int], list[float]]:
        return self.ids, [-1.0] * len(self.ids)


class DrawingExecutor:
    """Remembers what it was asked to run. `depth` steps are under way before the first has to be collected."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.steps: list[ForwardBatch] = []

    def launch(self, batch: ForwardBatch, sampled: list[Sequence], /) -> DrawnFlight:
        self.steps.append(batch)
        return DrawnFlight([len(self.steps) % 100 + 2] * len(sampled))

    def count_experts(self) -> float:
        return 12.5


def make_bench(executor: DrawingExecutor, *, num_pages: int = 400) -> Bench:
    return Bench(executor=executor, config=CONFIG, ceilings=SLOW, prompts=Prompts(CONFIG, 16), num_pages=num_pages, page_size=16,
                 max_num_seqs=8, steps=10, chunk_size=2048)


@pytest.mark.parametrize("depth", [1, 2])
def test_decode_runs_whole_batches_at_the_asked_context_without_prefill(depth: int) -> None:
    executor = DrawingExecutor(depth)
    figure = engine_figures.decode(make_bench(executor), 4, 200)
    assert figure.batch == 4 and figure.tok_s > 0 and figure.experts == 12.5
    assert all(step.query_lens == [1] * 4 for step in executor.steps)
    assert executor.steps[0].seq_lens == [200] * 4
    assert "FLOOR" not in figure.note


def test_a_figure_above_the_floor_is_called_unbelievable() -> None:
    bench = make_bench(DrawingExecutor(1))
    impossible = Ceilings(bytes_per_s=1.0)
    figure = engine_figures.decode(Bench(**{**{name: getattr(bench, name) for name in Bench.__slots__}, "ceilings": impossible}), 2, 64)
    assert "not believable" in figure.note


@pytest.mark.parametrize("depth", [1, 2])
def test_prefill_steps_are_full(depth: int) -> None:
    executor = DrawingExecutor(depth)
    figure = engine_figures.prefill(make_bench(executor), 2048, num_chunks=6)
    assert [sum(step.query_lens) for step in executor.steps] == [2048] * 6
    assert figure.context == 1024 and figure.tok_s > 0


def test_latency_is_one_step_of_one_prompt() -> None:
    executor = DrawingExecutor(2)
    engine_figures.latency(make_bench(executor))
    assert {tuple(step.query_lens) for step in executor.steps} == {(1024,)}


@pytest.mark.parametrize("depth", [1, 2])
def test_offline_gives_every_request_all_its_tokens(depth: int) -> None:
    figure = engine_figures.offline(make_bench(DrawingExecutor(depth), num_pages=800), 12)
    assert figure.name == "12 x 1000/100" and "req/s" in figure.note


def test_report_keeps_older_figures_and_replaces_those_taken_again(tmp_path: Path) -> None:
    def figure(batch: int, step_ms: float) -> EngineFigure:
        return EngineFigure(kind="decode", name=f"batch {batch}", batch=batch, context=64, step_ms=step_ms, tok_s=1.0, floor_ms=1.0)

    first = EngineReport(tmp_path, "engine", {"gpu": "none"})
    first.add(figure(1, 2.0))
    first.add(figure(2, 3.0))
    second = EngineReport(tmp_path, "engine", {"gpu": "none"})
    second.add(figure(2, 4.0))
    text = (tmp_path / "engine.md").read_text()
    assert "| decode | batch 1 | 2 |" in text and "| decode | batch 2 | 4 |" in text and "| 3 |" not in text


def test_a_figure_that_fails_is_told_about_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = EngineReport(tmp_path, "engine", {})
    run = engine.Run(SimpleNamespace(limit_s=60.0), report)  # type: ignore[arg-type]

    def fail() -> EngineFigure:
        raise RuntimeError("out of order")

    run.take("decode 1", fail)
    assert run.num_failed == 1 and "decode 1 FAILED: RuntimeError: out of order" in capsys.readouterr().out


def test_time_over_leaves_figures_out(tmp_path: Path) -> None:
    run = engine.Run(SimpleNamespace(limit_s=-1.0), EngineReport(tmp_path, "engine", {}))  # type: ignore[arg-type]
    run.take("decode 1", lambda: pytest.fail("was begun"))
    assert run.num_failed == 0
