"""SDKs and frameworks that rerank through Cohere's, Jina's, vLLM's and TEI's APIs, unchanged but for the address.

The gateway ranks candidates in reverse, with scores from 0.9 down, and has no tokens of the image `gone`.
"""

from __future__ import annotations

import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else litellm fetches a price list when it is imported

import cohere
import litellm
from haystack import Document as HaystackDocument
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from langchain_cohere import CohereRerank
from langchain_core.documents import Document

GATEWAY, KEY = os.environ["EDJE_GATEWAY"], os.environ["EDJE_KEY"]
IDS = ["img-1", "img-2", "img-3"]
REVERSED = [2, 1, 0]


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_cohere_ranks_strings(client):
    answer = client(KEY, base_url=GATEWAY).rerank(model="rerank-v3.5", query="a dog", documents=IDS)

    assert [result.index for result in answer.results] == REVERSED
    scores = [result.relevance_score for result in answer.results]
    assert scores == sorted(scores, reverse=True)


def test_cohere_takes_the_best_and_learns_of_missing_images():
    client = cohere.ClientV2(KEY, base_url=GATEWAY)

    best = client.rerank(model="m", query="a dog", documents=IDS, top_n=2)
    with_missing = client.rerank(model="m", query="a dog", documents=["img-1", "gone"])

    assert [result.index for result in best.results] == [2, 1]
    assert [(result.index, result.relevance_score) for result in with_missing.results] == [(0, 0.9), (1, 0.0)]


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_cohere_raises_for_a_wrong_key(client):
    with pytest.raises(cohere.errors.UnauthorizedError, match="an API key is needed"):
        client("wrong", base_url=GATEWAY).rerank(model="m", query="a dog", documents=IDS)


def test_cohere_raises_for_too_many_documents():
    with pytest.raises(cohere.errors.UnprocessableEntityError, match="at most 1000"):
        cohere.ClientV2(KEY, base_url=GATEWAY).rerank(model="m", query="a dog", documents=["a"] * 1_001)


def test_langchain_compresses_documents():
    ranker = CohereRerank(base_url=GATEWAY, cohere_api_key=KEY, model="rerank-v3.5", top_n=2)

    ranked = ranker.compress_documents([Document(page_content=name) for name in IDS], "a dog")

    assert [document.page_content for document in ranked] == ["img-3", "img-2"]
    assert ranked[0].metadata["relevance_score"] == 0.9


def test_haystack_ranks_documents():
    ranker = CohereRanker(api_key=Secret.from_token(KEY), api_base_url=GATEWAY, model="rerank-v3.5", top_k=2)

    ranked = ranker.run(query="a dog", documents=[HaystackDocument(content=name) for name in IDS])["documents"]

    assert [document.content for document in ranked] == ["img-3", "img-2"]


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("cohere/rerank-v3.5", f"{GATEWAY}/v2/rerank"),
        ("jina_ai/jina-reranker-v2", f"{GATEWAY}/v1/rerank"),
        ("hosted_vllm/edje", GATEWAY),
        ("huggingface/edje", GATEWAY),
    ],
)
def test_litellm_ranks_through_each_of_its_providers(model, base):
    answer = litellm.rerank(model=model, query="a dog", documents=IDS, top_n=3, api_base=base, api_key=KEY)

    assert [result["index"] for result in answer.results] == REVERSED
