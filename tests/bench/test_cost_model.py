"""The cost model against the steps that were measured on one GPU, and against sums that any split must keep."""

from pathlib import Path

import pytest

from bench import cost_model
from bench.cost_model import FITS, MACHINES, full_model, handover_s, predict
from bench.links import NVLINK, TWO_NODES
from bench.rank_work import Split, rank_ops, talk_s, weight_bytes
from bench.roofline import Work, step_ops
from bench.step_model import read_figures

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MEASURED = cost_model.fitted(RESULTS)


@pytest.mark.parametrize(("name", "decode", "prefill"), [("v2-lite", 0.03, 0.06), ("v3-layers:4", 0.06, 0.26)])
def test_steps_of_one_gpu_are_missed_by_little(name: str, decode: float, prefill: float) -> None:
    config, model, figures = MEASURED[name]
    missed = cost_model.errors(config, model, figures, FITS[name][0].ceilings)
    assert len(missed) >= 7
    for figure, error in missed:
        assert abs(error) <= (decode if figure.phase == "decode" else prefill), figure


@pytest.mark.parametrize(("name", "decode", "prefill"), [("v2-lite", 0.11, 0.08), ("v3-layers:4", 0.08, 0.30)])
def test_steps_of_another_gpu_which_the_fit_has_not_seen_are_predicted(name: str, decode: float, prefill: float) -> None:
    (config, model, _), other = MEASURED[name], FITS[name][1]
    seen = [figure for figure in cost_model.full_steps(read_figures(RESULTS / other.file)) if figure.phase == "prefill" or figure.batch > 1]
    missed = cost_model.errors(config, model, seen, other.ceilings)
    assert len(missed) >= 5
    for figure, error in missed:
        assert abs(error) <= (decode if figure.phase == "decode" else prefill), figure


def test_a_step_left_out_of_the_fit_is_predicted_too() -> None:
    (config, _, figures), source = MEASURED["v3-layers:4"], FITS["v3-layers:4"][0]
    for left_out in (figure for figure in figures if figure.phase == "decode"):
        model = cost_model.fit(config, [figure for figure in figures if figure is not left_out], source.ceilings)
        (_, error), = cost_model.errors(config, model, [left_out], source.ceilings)
        assert abs(error) <= 0.06, left_out


def test_weights_are_those_of_the_published_models() -> None:
    v3, lite = full_model("v3"), full_model("v2-lite")
    assert weight_bytes(v3, Split()) == pytest.approx(671e9, rel=0.02)          # a byte per weight, mostly
    assert weight_bytes(lite, Split()) == pytest.approx(31.4e9, rel=0.03)
    assert sum(weight_bytes(v3, Split(tp=8)) for _ in range(8)) == pytest.approx(671e9, rel=0.03)


def test_experts_are_computed_once_whatever_the_split() -> None:
    v3, work = full_model("v3"), Work.decode(64, 1024)
    whole = sum(op.num_flops for op in step_ops(v3, work) if op.name.startswith("experts"))
    for split, groups in ((Split(tp=8), 1), (Split(tp=8, dp=2, is_ep=True), 2), (Split(tp=16, dp=16, is_ep=True), 16)):
        ours = sum(op.num_flops for op in rank_ops(v3, split, work) if op.name.startswith("experts"))
        assert ours * split.tp == pytest.approx(whole * groups, rel=1e-6)


def test_one_rank_says_nothing_and_more_say_more_over_slower_links() -> None:
    lite, work = full_model("v2-lite"), Work.decode(64, 1024)
    assert talk_s(lite, Split(), work, NVLINK) == 0.0
    assert 0.0 < talk_s(lite, Split(tp=8), work, NVLINK) < talk_s(lite, Split(tp=8), work, TWO_NODES)


def test_more_gpus_decode_more_tokens_and_a_hand_over_is_bytes_over_the_link() -> None:
    config, (_, model, _) = full_model("v2-lite"), MEASURED["v2-lite"]
    one, eight = (predict(config, model, MACHINES[1], split, Work.decode(128, 1024)) for split in (Split(), Split(tp=8, dp=8, is_ep=True)))
    assert one.talk_s == 0.0 and 4 * one.tok_s < eight.tok_s < 16 * one.tok_s  # fewer experts' weights per GPU: more than 8 times
    assert handover_s(config, 4096, NVLINK) == pytest.approx(4096 * 31_104 / NVLINK.pair_bytes_s)


def test_the_report_has_every_machine_and_says_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cost_model.main(["--results", str(RESULTS), "--out", str(tmp_path / "model.md")]) == 0
    text = capsys.readouterr().out
    assert all(text.count(machine.name) == 2 for machine in MACHINES)
    assert "does not fit: 85 GB of weights per GPU" in text and text.strip() == (tmp_path / "model.md").read_text().strip()
