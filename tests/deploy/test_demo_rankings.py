"""The demo's rankings: ranks, figures, the questions that are shown, and the check of the shipped model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo_rankings import NUM_SHOWN, Figures, Option, Question, figures_of, shown
from demo_requests import ask_all
from demo_tables import about_the_texts, ranking_table, summary
from protocols.events import RerankResponse, Result
from server_process import ServiceError
from workers.client import Reply

ANSWERED_BY = {"model": "0" * 16, "engine": "1" * 16}


def ranking(before, after, right=None, *, text="a text", image_id=None):
    """Return a ranking of names, given in the first stage's order and in the reply's order."""
    question = Question(text, [Option(name, f"caption of {name}", 0.5) for name in before], right, image_id)
    results = [Result(index=before.index(name), id=name, relevance_score=0.5, logit=0.0) for name in after]
    return question.ranking(results, {"score": 1.0})


def test_a_question_about_a_text_is_a_request_for_images():
    request = Question("a red cup", [Option("b", "B", 0.7), Option("a", "A", 0.2)]).request("r-1")

    assert request.query.text == "a red cup"
    assert request.candidates == [{"image_id": "b", "score": 0.7}, {"image_id": "a", "score": 0.2}]


def test_a_question_about_an_image_is_a_request_for_texts():
    request = Question("shown", [Option("b", "a cup", 0.7)], image_id="i").request("r-1")

    assert request.query.image_id == "i"
    assert request.candidates == [{"text": "a cup", "id": "b", "score": 0.7}]


def test_every_candidate_keeps_its_first_stage_rank():
    results = ranking("abc", "cab").results

    assert [(each.option.name, each.rank, each.rank_before) for each in results] == [
        ("c", 1, 3),
        ("a", 2, 1),
        ("b", 3, 2),
    ]


@given(st.permutations("abcdef"), st.permutations("abcdef"), st.sampled_from("abcdef"), st.integers(1, 6))
def test_the_right_candidate_is_always_among_those_shown(before, after, right, num_shown):
    answer = ranking(before, after, right)

    assert right in [each.option.name for each in answer.best_before(num_shown)]
    assert right in [each.option.name for each in answer.best_after(num_shown)]
    assert len(answer.best_before(num_shown)) == len(answer.best_after(num_shown)) == num_shown


def test_the_best_are_shown_in_order_if_the_right_candidate_is_unknown():
    answer = ranking("abc", "cab")

    assert [each.option.name for each in answer.best_before(2)] == ["a", "b"]
    assert [each.option.name for each in answer.best_after(2)] == ["c", "a"]


def test_a_right_candidate_is_lifted_if_it_became_first():
    assert ranking("ab", "ba", "b").is_lifted()
    assert not ranking("ab", "ab", "a").is_lifted()
    assert not ranking("ab", "ab", "b").is_lifted()
    assert not ranking("ab", "ba", "elsewhere").is_lifted()
    assert not ranking("ab", "ba").is_lifted()


def test_the_figures_count_every_question_whose_answer_is_known():
    figures = figures_of(
        [
            ranking("ab", "ba", "b"),
            ranking("ab", "ab", "a"),
            ranking("ab", "ba", "a"),
            ranking("ab", "ba", "the first stage did not find it"),
            ranking("ab", "ba", "b", image_id="texts are no part of it"),
            ranking("ab", "ba"),
        ]
    )

    assert figures == Figures(num_questions=4, first_stage_r1=0.5, reranked_r1=0.5, num_lifted=1)


def test_there_are_no_figures_if_no_right_candidate_is_known():
    assert figures_of([ranking("ab", "ba"), ranking("ab", "ab", "a", image_id="i")]) is None


def test_the_first_lifted_are_shown_and_then_the_texts():
    lifted = [ranking("ab", "ba", "b", text=f"lifted {number}") for number in range(NUM_SHOWN + 1)]
    failed = ranking("ab", "ab", "b", text="failed")
    texts = ranking("ab", "ab", "a", image_id="i")

    assert shown([failed, *lifted, texts]) == [*lifted[:NUM_SHOWN], texts]
    assert shown([failed, lifted[0], texts]) == [lifted[0], failed, texts]


@pytest.mark.parametrize("figures", [Figures(40, 0.5, 0.9, 16), Figures(40, 0.7, 0.9, 8), Figures(40, 0.65, 0.85, 4)])
def test_good_figures_pass_the_check(figures):
    assert figures.problem() is None


@pytest.mark.parametrize(
    ("figures", "problem"),
    [
        (Figures(40, 0.2, 0.825, 26), "reranked R@1 is 0.825, and must be at least 0.85"),
        (Figures(40, 0.725, 0.9, 8), "from 0.725 to 0.900, and must add at least 0.2"),
        (Figures(40, 0.5, 0.9, 3), "put 3 right images first that were not; there must be 4"),
    ],
)
def test_the_check_names_the_figure_that_fails(figures, problem):
    assert problem in figures.problem()


def test_the_summary_is_one_line_of_figures():
    line = summary(Figures(40, 0.55, 0.925, 15), num_candidates=20, num_pictures=200)

    assert line == (
        "Right image first, of 40 questions over 200 pictures: first stage 55.0%, its best 20 reranked 92.5%. "
        "Reranking put 15 right images first that were not."
    )


def test_the_rank_of_the_right_text_is_reported():
    assert "came first" in about_the_texts(ranking("ab", "ba", "b", image_id="i"))
    assert "came only number 2" in about_the_texts(ranking("ab", "ba", "a", image_id="i"))
    assert about_the_texts(ranking("ab", "ba", image_id="i")) is None
    assert about_the_texts(ranking("ab", "ba", "b")) is None


def test_the_table_marks_the_right_candidate_even_when_it_is_last():
    names = "abcdefgh"
    table = ranking_table(ranking(names, names, "h"), caveat="nothing is proven")

    assert list(table.columns[0].cells) == ["1", "2", "3", "4", "8"]
    assert list(table.columns[4].cells) == ["", "", "", "", "<- right"]
    assert str(table.caption) == "nothing is proven"
    assert len(ranking_table(ranking("ab", "ba"), caveat=None).columns) == 4


class Client:
    """Answers every request with its candidates in reverse order, or with an error."""

    def __init__(self, status="ok"):
        self.status, self.asked = status, {}

    def publish_request(self, request):
        self.asked[request.request_id] = request
        return self

    def result(self, timeout_s):
        """Return at once: the request counts as published."""

    def reply_to(self, request_id, timeout_s):
        turned = reversed(range(len(self.asked[request_id].candidates)))
        results = [Result(index=index, relevance_score=0.5, logit=0.0) for index in turned]
        error = {"code": "no", "message": "not today"} if self.status == "error" else None
        fields = {"request_id": request_id, "status": self.status, "error": error, **ANSWERED_BY}
        return Reply(RerankResponse(results=[] if error else results, **fields), None)


def test_each_question_gets_its_own_answer():
    questions = [Question(text, [Option(f"{text}-{place}", "", 0.0) for place in "12"]) for text in "ab"]

    answers = ask_all(Client(), questions)

    assert [[each.option.name for each in ranking.results] for ranking in answers.rankings] == [
        ["a-2", "a-1"],
        ["b-2", "b-1"],
    ]
    assert answers.model_digest == ANSWERED_BY["model"]


def test_an_answer_without_a_ranking_ends_the_demo():
    with pytest.raises(ServiceError, match=r"answered with error: .*not today"):
        ask_all(Client("error"), [Question("a", [Option("x", "", 0.0)])])
