"""Evaluation of fixed candidate lists: metrics before and after, lists without labels, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from edje.calibration import Calibration, DirectionCalibration
from edje.checkpoint import read_tokenizer_json
from edje.data.candidate_lists import CandidateList, JudgedCandidate
from edje.evaluate import main
from edje.evaluation.errors import ServiceFailed, TaskInvalid
from edje.evaluation.judged_lists import METRICS, evaluate_lists, metrics_of
from edje.evaluation.service_ranking import rank_through_service, request_of
from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from workers.publish.requests import requests_in


def judged(*labels, scores=None, query="a dog", direction="text-to-image"):
    given = scores or [-float(number) for number in range(len(labels))]
    candidates = tuple(
        JudgedCandidate(f"{number}", score, label)
        for number, (score, label) in enumerate(zip(given, labels, strict=True))
    )
    return CandidateList(direction, query, candidates, line=1)


def evaluated(lists, orders):
    return evaluate_lists(lists, [np.array(order) for order in orders], num_resamples=10, seed=0)


def rows(result):
    return {row.metric: (row.first_stage.value, row.reranked.value) for row in result.rows}


def test_the_metrics_of_a_ranking_are_those_of_the_textbook():
    values = dict(zip(METRICS, metrics_of(np.array([0.0, 1.0, 0.0, 1.0])), strict=True))

    gain = 1 / np.log2(3) + 1 / np.log2(5)
    assert values["AP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert values["nDCG@10"] == pytest.approx(gain / (1 + 1 / np.log2(3)))
    assert values["MRR"] == 0.5
    assert (values["R@1"], values["R@5"], values["R@10"]) == (0, 1, 1)


def test_graded_labels_are_gains():
    assert metrics_of(np.array([3.0, 2.0, 0.0]))[1] == pytest.approx(1)
    assert metrics_of(np.array([2.0, 3.0, 0.0]))[1] == pytest.approx((2 + 3 / np.log2(3)) / (3 + 2 / np.log2(3)))


def test_both_orders_are_measured_and_the_shares_of_better_and_worse_lists_reported():
    lists = [judged(0, 1, 0), judged(1, 0, 0, query="a cat"), judged(1, 0, 0, query="a bird"), judged(0, 1)]

    [result] = evaluated(lists, [[1, 0, 2], [2, 1, 0], [0, 1, 2], [1, 0]])

    assert rows(result)["R@1"] == (0.5, 0.75)
    assert (result.better.value, result.worse.value) == (0.5, 0.25)
    assert result.first_changed == 0.75


def test_the_order_before_is_that_of_the_scores_and_else_the_given_one():
    by_score = judged(0, 1, scores=[0.1, 0.9])
    without = judged(0, 1, scores=[None, None], query="a cat")

    [result] = evaluated([by_score, without], [[0, 1], [0, 1]])

    assert rows(result)["R@1"] == (0.5, 0.0)
    assert result.faults == {"missing": 1}
    assert result.first_changed == 0.5


def test_lists_that_no_order_changes_are_counted_and_not_measured():
    [result] = evaluated([judged(None, None), judged(0, 0), judged(1, None)], [[1, 0], [0, 1], [1, 0]])

    assert (result.num_lists, result.num_unjudged, result.num_without_positive) == (3, 1, 1)
    assert rows(result)["MRR"] == (1.0, 0.5)
    assert any("no label" in remark for remark in result.section().remarks)


def test_lists_without_any_label_have_no_metrics():
    [result] = evaluated([judged(None, None)], [[1, 0]])

    assert result.rows == ()
    assert result.better is None
    assert result.section().remarks[0] == "another first candidate in 100.0 % of the lists"


def test_each_direction_has_its_own_result():
    lists = [judged(1, 0), judged(0, 1, direction="image-to-text")]

    texts, images = evaluated(lists, [[0, 1], [0, 1]])

    assert (texts.direction, rows(texts)["R@1"]) == ("text-to-image", (1, 1))
    assert (images.direction, rows(images)["R@1"]) == ("image-to-text", (0, 0))


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2], [0, 1, 2]])
def test_a_ranking_that_is_not_a_permutation_is_refused(order):
    with pytest.raises(TaskInvalid, match="line 1: the ranking is not an order of the 2 candidates"):
        evaluated([judged(1, 0)], [order])


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that ranks by the first stage alone, three images, and lists of both directions."""
    folder = tmp_path_factory.mktemp("lists")
    write_untrained(VARIANTS["tiny"], folder / "plain", seed=0)
    loaded = load_checkpoint(folder / "plain")
    constants = DirectionCalibration(temperature=1.0, offset=0.0, first_stage_gain=1e6)
    config = replace(loaded.config, calibration=Calibration(constants, constants))
    save_checkpoint(folder / "model", config, loaded.model, read_tokenizer_json(folder / "plain"))
    (folder / "images").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{number}.png")
    images = [{"image": f"{number}.png", "score": number, "label": int(number == 2)} for number in range(3)]
    texts = [{"text": text, "label": int(text == "red")} for text in ("green", "red")]
    lists = [{"query": "blue", "candidates": images}, {"query": {"image": "0.png"}, "candidates": texts}]
    (folder / "lists.jsonl").write_text("\n".join(map(json.dumps, lists)))
    return folder


@pytest.fixture
def evaluate(folder):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)

    def run(*options):
        words = [folder / "model", "--features", folder / "features", "--resamples", "5", *options]
        return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})

    return run


def test_the_command_ranks_the_lists_with_the_calibrated_model(evaluate, folder):
    done = evaluate("--lists", folder / "lists.jsonl", "--images", folder / "images", "--out", folder / "report.json")

    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((folder / "report.json").read_text()) == report
    by_direction = {result["direction"]: result for result in report["results"]}
    # The first stage alone decides: by its scores, or by the given order where it has none.
    assert {row["metric"]: row["reranked"]["value"] for row in by_direction["text-to-image"]["rows"]}["R@1"] == 1
    assert {row["metric"]: row["reranked"]["value"] for row in by_direction["image-to-text"]["rows"]}["R@1"] == 0
    assert by_direction["image-to-text"]["faults"] == {"missing": 1}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"query": "a", "candidates": [{"image": "absent.png"}]}', "absent.png"),
        ('{"query": "a", "candidates": [{"image": "../lists.jsonl"}]}', "outside"),
        ("{", "line 1"),
        ("", "holds no candidate list"),
    ],
)
def test_lists_that_cannot_be_used_end_the_command_with_a_sentence(evaluate, folder, tmp_path, line, words):
    (tmp_path / "bad.jsonl").write_text(line)

    done = evaluate("--lists", tmp_path / "bad.jsonl", "--images", folder / "images")

    assert done.exit_code == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--lists", "a.jsonl"),
        ("--lists", "a.jsonl", "--data", "b.toml"),
        ("--lists", "a", "--images", "b", "--k", "3"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(evaluate, options):
    assert evaluate(*options).exit_code == 2


# Through a running service

SERVICE = """
import json, sys
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    last = len(request["candidates"]) - 1
    results = [{"index": index} for index in range(last, 0, -1)]
    print(json.dumps({"status": "partial", "model": MODEL, "results": results}))
"""


def service(program):
    return [sys.executable, "-c", program]


def test_a_services_replies_are_the_order_and_missing_candidates_follow():
    lists = [judged(0, 1, 0), judged(0, 1)]

    orders, model = rank_through_service(lists, service(SERVICE.replace("MODEL", "'m1'")))

    assert [order.tolist() for order in orders] == [[2, 1, 0], [1, 0]]
    assert model == "m1"


def test_a_list_becomes_a_request_event_with_scores_where_it_has_them():
    texts = judged(1, 0, direction="image-to-text", query="img-7")

    assert request_of(judged(1, 0, scores=[0.5, None]), "r-1") == {
        "schema_version": 1,
        "request_id": "r-1",
        "query": {"text": "a dog"},
        "candidates": [{"image_id": "0", "score": 0.5}, {"image_id": "1"}],
    }
    assert request_of(texts, "r-2")["query"] == {"image_id": "img-7"}
    assert requests_in([json.dumps(request_of(texts, "r-2"))])[0].texts() == ["0", "1"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('no broker')", "the service did not answer: no broker"),
        ("", "0 replies to 2 requests"),
        (SERVICE.replace("MODEL", "number"), "workers with several models replied: 0, 1"),
        ('for line in open(0): print(\'{"status": "expired"}\')', "line 1: the service replied expired"),
    ],
)
def test_a_service_that_does_not_rank_the_lists_is_an_error(program, words):
    with pytest.raises(ServiceFailed, match=words):
        rank_through_service([judged(0, 1), judged(1, 0)], service(program))
