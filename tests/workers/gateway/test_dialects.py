"""The rerank APIs of other services: what their clients send is understood, and what they read comes back."""

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.events import Query, RerankResponse, Result
from workers.gateway.calls import candidates_of, given_order, missing_answer, ranked_answer
from workers.gateway.dialects import dialect_of, parse_object, read_call, render
from workers.gateway.errors import ApiError, Unanswered


def call_of(body: dict, strings_are="image_id", max_documents=1000):
    return read_call(body, strings_are=strings_are, max_documents=max_documents)


def reply_to(call, order, missing=(), logits=None) -> RerankResponse:
    results = [
        Result(index=index, relevance_score=1 - place / 100, logit=float(-place)) for place, index in enumerate(order)
    ]
    return RerankResponse(
        request_id="r-1",
        status="partial" if missing else "ok",
        results=results,
        missing=list(missing),
        model="m",
        engine="e",
    )


def answer_to(call, order, missing=(), ids_by_uri=None):
    candidates, indexes = candidates_of(call.documents, ids_by_uri or {})
    return ranked_answer(call, candidates, indexes, reply_to(call, order, missing), trace_id="t")


def code_of(body: dict, **options) -> tuple[int, str]:
    with pytest.raises(ApiError) as caught:
        call_of(body, **options)
    return caught.value.status, caught.value.code


def test_cohere_sends_strings_and_reads_index_and_score_best_first():
    call = call_of({"model": "rerank-v3.5", "query": "a dog", "documents": ["a", "b", "c"], "max_tokens_per_doc": 4096})

    body = render("cohere", "/v2/rerank", call, answer_to(call, [2, 0, 1]))

    assert call.query == Query(text="a dog")
    assert [result["index"] for result in body["results"]] == [2, 0, 1]
    assert [set(result) for result in body["results"]] == [{"index", "relevance_score"}] * 3
    assert body["model"] == "rerank-v3.5"
    assert body["meta"]["api_version"] == {"version": "2"}


def test_jina_reads_the_documents_when_it_asks_for_them():
    call = call_of({"query": "a dog", "documents": ["a", {"text": "b"}], "top_n": 2, "return_documents": True})

    body = render("cohere", "/v1/rerank", call, answer_to(call, [1, 0]))

    assert [result["document"] for result in body["results"]] == [{"text": "b"}, {"text": "a"}]


def test_opensearch_asks_for_as_many_results_as_documents_and_gets_floats_for_all():
    call = call_of({"query": "a dog", "documents": ["a", "gone", "c"], "top_n": 3})

    body = render("cohere", "/v1/rerank", call, answer_to(call, [2, 0], missing=["gone"]))

    encoded = orjson.dumps(body).decode()
    assert len(body["results"]) == 3
    assert body["results"][-1] == {"index": 1, "relevance_score": 0.0}
    assert '"relevance_score":1.0' in encoded
    assert '"relevance_score":0.0' in encoded
    assert body["missing"] == ["gone"]


def test_tei_sends_texts_and_reads_a_bare_list():
    call = call_of({"query": "a dog", "texts": ["a", "b"], "raw_scores": False, "truncate": False, "return_text": True})

    body = render("tei", "/rerank", call, answer_to(call, [1, 0]))

    assert body == [{"index": 1, "score": 1.0, "text": "b"}, {"index": 0, "score": 0.99, "text": "a"}]


def test_tei_reads_logits_when_it_asks_for_raw_scores_and_missing_images_have_the_lowest():
    call = call_of({"query": "a dog", "texts": ["a", "b"], "raw_scores": True})

    body = render("tei", "/rerank", call, answer_to(call, [1], missing=["a"]))

    assert body == [{"index": 1, "score": 0.0}, {"index": 0, "score": -30.0}]


def test_weaviate_reads_scores_in_the_order_of_its_documents():
    body = {"query": "a dog", "documents": ["a", "b", "c"], "property": "imageId"}
    call = call_of(body)

    answer = render(dialect_of(body), "/rerank", call, answer_to(call, [2, 0], missing=["b"]))

    assert answer == {
        "scores": [
            {"document": "a", "score": 0.99},
            {"document": "b", "score": 0.0},
            {"document": "c", "score": 1.0},
        ]
    }


@pytest.mark.parametrize(
    ("document", "kind", "value"),
    [
        ("img-1", "image_id", "img-1"),
        ({"image_id": "img-1", "score": 0.5}, "image_id", "img-1"),
        ({"image": "img-1"}, "image_id", "img-1"),
        ({"image": "https://x/1.jpg"}, "uri", "https://x/1.jpg"),
        ({"url": "s3://bucket/1.jpg"}, "uri", "s3://bucket/1.jpg"),
        ({"type": "image_url", "image_url": {"url": "https://x/1.jpg"}}, "uri", "https://x/1.jpg"),
        ({"content": [{"type": "image_url", "image_url": {"url": "https://x/1.jpg"}}]}, "uri", "https://x/1.jpg"),
        ({"type": "image", "format": "url", "value": "https://x/1.jpg"}, "uri", "https://x/1.jpg"),
        ({"text": "img-1"}, "image_id", "img-1"),
    ],
)
def test_a_document_names_an_image_in_the_way_of_each_client(document, kind, value):
    [read] = call_of({"query": "a dog", "documents": [document]}).documents

    assert (read.kind, read.value) == (kind, value)


@pytest.mark.parametrize(
    "document", [{"image": "data:image/png;base64,AAAA"}, {"type": "image", "format": "base64", "value": "AAAA"}]
)
def test_the_bytes_of_an_image_are_refused_with_the_way_to_publish_it(document):
    with pytest.raises(ApiError, match="POST /v1/images") as caught:
        call_of({"query": "a dog", "documents": [document]})

    assert caught.value.code == "image_bytes"


def test_first_stage_scores_go_to_the_worker():
    call = call_of({"query": "a dog", "documents": [{"image_id": "a", "score": 3}, "b"]})

    candidates, _ = candidates_of(call.documents, {})

    assert candidates == [{"image_id": "a", "score": 3.0}, {"image_id": "b"}]


def test_strings_are_addresses_or_texts_where_the_setting_says_so():
    body = {"query": "img-1", "documents": ["a dog", "a cat"]}

    assert [d.kind for d in call_of(body, strings_are="uri").documents] == ["uri", "uri"]
    call = call_of(body, strings_are="text")
    assert call.query == Query(image_id="img-1")
    assert candidates_of(call.documents, {})[0] == [{"text": "a dog"}, {"text": "a cat"}]


def test_a_query_may_be_an_image_and_its_documents_are_texts_then():
    call = call_of({"query": {"image_id": "img-1"}, "documents": ["a dog", {"text": "a cat"}]})

    assert call.query == Query(image_id="img-1")
    assert [document.kind for document in call.documents] == ["text", "text"]


def test_an_address_without_an_image_is_missing_and_costs_no_candidate():
    call = call_of({"query": "a dog", "documents": [{"image": "https://x/1"}, {"image": "https://x/2"}, "c"]})

    candidates, indexes = candidates_of(call.documents, {"https://x/2": "two"})
    answer = answer_to(call, [1, 0], ids_by_uri={"https://x/2": "two"})

    assert [candidate["image_id"] for candidate in candidates] == ["two", "c"]
    assert indexes == [1, 2]
    assert [result.index for result in answer.results] == [2, 1, 0]
    assert answer.missing == [{"image": "https://x/1"}]


def test_a_document_that_comes_twice_has_a_score_each_time():
    call = call_of({"query": "a dog", "documents": ["a", "a"]})

    body = render("cohere", "/rerank", call, answer_to(call, [0, 1]))

    assert [result["index"] for result in body["results"]] == [0, 1]


@pytest.mark.parametrize("top_n", [None, 0])
def test_without_top_n_every_document_has_a_result(top_n):
    call = call_of({"query": "a dog", "documents": ["a", "b"], "top_n": top_n})

    assert call.num_results() == 2


def test_top_n_bounds_the_results_and_missing_images_fill_up():
    call = call_of({"query": "a dog", "documents": ["a", "b", "c", "d"], "top_n": 2})

    assert len(render("cohere", "/rerank", call, answer_to(call, [3, 1]))["results"]) == 2
    filled = render("cohere", "/rerank", call, answer_to(call, [3], missing=["a", "b", "c"]))["results"]
    assert [result["index"] for result in filled] == [3, 0]


def test_no_documents_are_no_results():
    call = call_of({"query": "a dog", "documents": []})

    assert render("cohere", "/rerank", call, missing_answer(call, "r", trace_id=None))["results"] == []


def test_a_degraded_answer_keeps_the_given_order_and_says_why():
    call = call_of({"query": "a dog", "documents": ["a", "b", "c", "d"]})

    answer = given_order(call, "r", Unanswered(504, "timeout", "no reply"), trace_id=None)
    body = render("cohere", "/rerank", call, answer)

    assert body["degraded"] == "timeout"
    assert [(r["index"], r["relevance_score"]) for r in body["results"]] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize("order", [[0, 0], [0, 5], [0]])
def test_a_reply_that_does_not_fit_the_request_is_an_error(order):
    call = call_of({"query": "a dog", "documents": ["a", "b"]})

    with pytest.raises(ValueError, match="the reply ranks"):
        answer_to(call, order)


def test_a_query_image_without_tokens_is_not_found():
    call = call_of({"query": {"image_id": "gone"}, "documents": ["a dog"]})

    with pytest.raises(ApiError, match="no tokens of the query's image 'gone'") as caught:
        answer_to(call, [], missing=["gone"])

    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "invalid_request"),
        ({"query": "a"}, 422, "invalid_request"),
        ({"query": "", "documents": ["a"]}, 422, "invalid_request"),
        ({"query": "a" * 10_001, "documents": ["a"]}, 422, "invalid_request"),
        ({"query": ["a"], "documents": ["a"]}, 422, "invalid_request"),
        ({"query": {}, "documents": ["a"]}, 422, "invalid_request"),
        ({"query": {"text": "a", "image_id": "b"}, "documents": ["a"]}, 422, "invalid_request"),
        ({"query": "a", "documents": "a"}, 422, "invalid_request"),
        ({"query": "a", "documents": [1]}, 422, "invalid_request"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, 422, "invalid_request"),
        ({"query": "a", "documents": ["a"], "on_failure": "whatever"}, 422, "invalid_request"),
        ({"query": "a", "documents": ["a"] * 11}, 422, "too_many_documents"),
        ({"query": "a", "texts": ["a"] * 11}, 422, "too_many_documents"),
        ({"query": "a", "documents": [""]}, 422, "invalid_image_id"),
        ({"query": "a", "documents": ["a\nb"]}, 422, "invalid_image_id"),
        ({"query": "a", "documents": ["a" * 300]}, 422, "invalid_image_id"),
        ({"query": "a", "documents": [{}]}, 422, "invalid_document"),
        ({"query": "a", "documents": [{"image_id": 7}]}, 422, "invalid_document"),
        ({"query": "a", "documents": [{"image_id": "a", "score": "high"}]}, 422, "invalid_score"),
        ({"query": "a", "documents": [{"image_id": "a", "score": True}]}, 422, "invalid_score"),
        ({"query": {"image_id": "a"}, "documents": [{"image_id": "b"}]}, 422, "wrong_document_kind"),
    ],
)
def test_what_is_wrong_with_a_body_has_a_status_and_a_code(body, status, code):
    assert code_of(body, max_documents=10) == (status, code)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1e999]", b"nul", b"[" * 100_000])
def test_what_is_not_json_is_refused(data):
    with pytest.raises(ApiError) as caught:
        parse_object(data)

    assert caught.value.status == 400


@pytest.mark.parametrize("data", [b"[]", b"null", b'"a"', b"1"])
def test_json_that_is_no_object_is_refused(data):
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse_object(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
documents = st.text(max_size=5) | st.dictionaries(
    st.sampled_from(["image_id", "image", "image_url", "text", "score", "content", "value", "type"]), json_values
)


FIELDS = {"query": json_values, "documents": st.lists(documents | json_values, max_size=4), "texts": json_values}


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "query": json_values,
            "documents": st.lists(documents | json_values, max_size=4),
            "texts": json_values,
        },
    )
)
def test_any_body_is_a_call_or_a_refusal(body):
    call = refusal = None
    try:
        call = call_of(body)
    except ApiError as error:
        refusal = error

    if refusal is not None:
        assert 400 <= refusal.status < 500
        assert refusal.message
    else:
        assert len(call.documents) == len(body.get("texts", body.get("documents")))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), st.integers(0, 14))
def test_every_answer_has_one_float_per_document_best_first(data, ids, top_n):
    call = call_of({"query": "a dog", "documents": ids, "top_n": top_n})
    missing = data.draw(st.sets(st.sampled_from("abcdef")))
    order = data.draw(st.permutations([index for index, name in enumerate(ids) if name not in missing]))
    order = order[: call.num_results()]

    body = render("cohere", "/v2/rerank", call, answer_to(call, order, missing=[m for m in missing if m in ids]))

    scores = [result["relevance_score"] for result in body["results"]]
    assert len({result["index"] for result in body["results"]}) == len(scores) == min(top_n or len(ids), len(ids))
    assert all(type(score) is float and 0 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)
    assert json.loads(orjson.dumps(body)) == body
