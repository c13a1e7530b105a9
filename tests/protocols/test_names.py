"""Topics and keys."""

import pytest

from protocols.blob import blob_key, blob_keys
from protocols.topics import Topics


def test_topics_have_their_published_names():
    topics = Topics()

    assert (topics.images_new, topics.images_indexed) == ("images.new", "images.indexed")
    assert (topics.rerank_requests, topics.rerank_responses) == ("rerank.requests", "rerank.responses")
    assert topics.dead_letter(topics.images_new) == "images.new.dlq"


def test_a_prefix_is_put_in_front_as_it_is():
    assert Topics("team-a.").rerank_requests == "team-a.rerank.requests"


@pytest.mark.parametrize("prefix", ["a b", "a/", "ä", "a\n", "x" * 230])
def test_a_prefix_that_makes_illegal_names_is_refused(prefix):
    with pytest.raises(ValueError, match="topic prefix"):
        Topics(prefix)


def test_the_longest_prefix_allowed_makes_legal_names():
    topics = Topics("x" * 229)

    assert len(topics.dead_letter(topics.rerank_responses)) == 249


def test_a_blob_key_names_model_and_image():
    assert blob_key("m-1", "img:7") == "vt:m-1:img:7"
    assert blob_keys("m-1", ["a", "b"]) == [blob_key("m-1", "a"), blob_key("m-1", "b")]
