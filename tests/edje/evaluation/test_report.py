"""Reports that can be read again, tables, and reproducible plots."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from edje.calibration import Calibration, DirectionCalibration
from edje.evaluation.comparison import evaluate
from edje.evaluation.cost import ScorerCost, cascade_cost, scorer_cost
from edje.evaluation.errors import PlotImpossible
from edje.evaluation.plots import Curve, Point, quality_vs_bytes, quality_vs_cost, quality_vs_k, reliability_diagram
from edje.evaluation.reliability import reliability
from edje.evaluation.report import Report, Result, print_report, read_report, to_json, to_markdown
from edje.evaluation.task import text_to_image
from edje.model.flops import Cost


@pytest.fixture(scope="module")
def report():
    """Three images; the first stage finds one of them, the scorer all."""
    similarity = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    right = np.eye(3, dtype=np.float32)
    task = text_to_image(similarity, np.arange(3))
    comparison = evaluate(task, lambda queries, candidates: right[queries, candidates], 3, num_resamples=50)
    return Report(
        checkpoint="models/[bold]one",
        model_digest="0123456789abcdef",
        trained=True,
        calibration=None,
        data="three pictures",
        split="test",
        first_stage="clip",
        scorer="torch",
        storage="int8",
        num_visual_tokens=64,
        payload_bytes_per_image=24_832,
        blob_bytes_per_image=24_966,
        seed=0,
        num_resamples=50,
        results=(Result(comparison, ScorerCost(gflop_per_query=0.3, gflop_per_pair=3.5)),),
    )


def test_a_report_is_one_line_of_json_that_can_be_read_again(report):
    text = to_json(report)

    assert "\n" not in text
    assert read_report(text) == report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 1}, "version 1; this program reads version 2"),
        ({"colour": "blue"}, "colour"),
        ({"results": [{"comparison": 1}]}, "comparison"),
    ],
)
def test_other_text_is_not_read_as_a_report(report, change, words):
    with pytest.raises(ValueError, match=words):
        read_report(json.dumps(json.loads(to_json(report)) | change))


def test_markdown_shows_both_rankings_and_names_model_and_data(report):
    text = to_markdown(report)

    assert "| R@1 | 33.3 [0.0, 100.0] | 100.0 [100.0, 100.0] | +66.7 [+0.0, +100.0] |" in text
    assert "24,832 B (24,966 B as a blob)" in text
    assert "text-to-image, k = 3: 3 queries, 3 candidates, 3.6 GFLOP per pair" in text
    assert "queries: 66.7 [0.0, 100.0] % better, 0.0 [0.0, 0.0] % worse." in text
    assert "UNTRAINED" not in text


def test_a_report_says_that_weights_are_untrained(report):
    assert "UNTRAINED" in to_markdown(replace(report, trained=False))


def test_a_report_says_whether_scores_are_probabilities(report):
    constants = DirectionCalibration(temperature=2.0, offset=-1.0, first_stage_gain=1.5)
    calibrated = replace(report, calibration=Calibration(constants, replace(constants, first_stage_gain=0.0)))

    assert "not calibrated: relevance scores are sigmoids of logits" in to_markdown(report)
    assert "calibrated, first-stage gain text-to-image 1.5, image-to-text 0" in to_markdown(calibrated)
    assert read_report(to_json(calibrated)) == calibrated


def test_a_report_shows_probabilities_and_requests_without_scores(report):
    [result] = report.results
    figures = reliability(np.zeros((3, 3)), np.eye(3, dtype=bool), np.arange(3), num_resamples=5)

    full = replace(report, results=(replace(result, reliability=figures, shuffled=result.comparison),))

    assert "of 9 pairs, 33.3 % of them positive: ECE 0.1667 [0.1667, 0.1667], Brier score 0.2500" in to_markdown(full)
    assert "in random order R@1 100.0 [100.0, 100.0]." in to_markdown(full)
    assert read_report(to_json(full)) == full


def test_the_terminal_shows_a_table_and_prints_names_that_look_like_markup(report):
    shown_to = io.StringIO()

    print_report(report, Console(width=100, file=shown_to))

    shown = shown_to.getvalue()
    assert "models/[bold]one" in shown
    assert "+66.7 [+0.0, +100.0]" in shown


def test_operations_are_converted_to_gflop():
    assert scorer_cost(Cost(per_pair=3_650_000_000, per_query=20_000_000, per_image=1)) == ScorerCost(0.02, 3.65)


def test_the_cost_of_a_pair_includes_its_share_of_the_query():
    assert ScorerCost(gflop_per_query=2.0, gflop_per_pair=0.1).per_pair_at(20) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("budget", "shared", "per_query", "per_pair"),
    [(5, False, 0.5, 1.01), (5, True, 0.3, 1.01), (0, False, 0.2, 0.01), (50, False, 0.5, 4.01)],
)
def test_a_cascade_costs_the_cheap_scorer_for_all_and_the_full_one_within_its_budget(
    budget, shared, per_query, per_pair
):
    cost = cascade_cost(ScorerCost(0.2, 0.01), ScorerCost(0.3, 4.0), budget, k=20, shared_query=shared)

    assert cost.gflop_per_query == pytest.approx(per_query)
    assert cost.gflop_per_pair == pytest.approx(per_pair)


POINTS = [Point("full joint", 3.65, (0.93, 0.92, 0.94)), Point("MaxSim", 0.012, (0.71,))]
CURVES = [
    Curve("int8", (Point("", 3_000, (0.8,), "8"), Point("", 6_000, (0.9, 0.91), "16"))),
    Curve("fp16", (Point("", 6_000, (0.81,)),)),
]
FIGURES = reliability(np.linspace(-4, 4, 60).reshape(20, 3), np.eye(20, 3, dtype=bool), np.arange(20), num_resamples=5)
DRAW = {
    "cost": lambda path: quality_vs_cost(POINTS, path, title="scenes", first_stage=0.58),
    "bytes": lambda path: quality_vs_bytes(CURVES, path, first_stage=0.58),
    "k": lambda path: quality_vs_k(CURVES, path, scale="log"),
    "reliability": lambda path: reliability_diagram({"text-to-image": FIGURES}, path, title="scenes"),
}


@pytest.mark.parametrize("kind", DRAW)
def test_the_same_figures_give_the_same_file(kind, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"

    DRAW[kind](first)
    DRAW[kind](second)

    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()
    assert {"reliability": "share of positives"}.get(kind, "R@1, %") in first.read_text()


def test_a_plot_can_be_a_png(tmp_path):
    pytest.importorskip("matplotlib")

    DRAW["cost"](tmp_path / "plot.png")

    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_neighbouring_points_do_not_cover_each_other(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from edje.evaluation import plots

    boxes = []
    name = plots._name

    def recorded(*arguments):
        text = name(*arguments)
        boxes.append(text)
        return text

    monkeypatch.setattr(plots, "_name", recorded)
    quality_vs_cost([Point(f"scorer number {n}", 1.0, (0.5,)) for n in range(4)], tmp_path / "plot.svg")

    shown = [text.get_window_extent() for text in boxes if text.axes is not None]
    assert len(shown) == 4
    assert not any(a.overlaps(b) for number, a in enumerate(shown) for b in shown[:number])


@pytest.mark.parametrize(
    ("points", "name", "words"),
    [
        (POINTS, "plot.pdf", r"neither \.svg nor \.png"),
        ([], "plot.svg", "nothing to draw"),
        ([Point("free", 0.0, (0.5,))], "plot.svg", "x is not positive"),
        ([Point("unknown", 1.0, ())], "plot.svg", "'unknown'"),
    ],
)
def test_figures_that_cannot_be_drawn_are_reported_in_a_sentence(points, name, words, tmp_path):
    with pytest.raises(PlotImpossible, match=words):
        quality_vs_cost(points, tmp_path / name)


def test_without_matplotlib_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(PlotImpossible, match=r"pip install 'edje-rerank\[train\]'"):
        quality_vs_cost(POINTS, tmp_path / "plot.svg")
