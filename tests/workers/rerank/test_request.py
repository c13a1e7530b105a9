"""How a request is cut into pieces, and which pairs of a piece are scored."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trt.text_lengths import padded_length
from workers.ports import Partition, Record
from workers.rerank.request import Piece, Request, cut
from workers.telemetry.tracer import Tracer

NUM_VISUAL_TOKENS = 4


def request_of(lengths: list[int], *, images: list[str] | None = None) -> Request:
    """A request for these images, or of these lengths of text for one image."""
    record = Record(Partition("t", 0), 0, None, b"", (), 0)
    request = Request(record, Tracer.off().begin(()), 0.0, "application/json", "replies")
    request.text_ids = [list(range(length)) for length in lengths]
    request.texts = [str(number) for number in range(len(lengths))]
    request.images = ["img"] if images is None else images
    request.num_pairs = len(lengths) if images is None else len(images)
    request.direction = "image-to-text" if images is None else "text-to-image"
    return request


def pieces_of(request: Request, piece_pairs: int = 4) -> list[Piece]:
    return cut(request, piece_pairs=piece_pairs, num_visual_tokens=NUM_VISUAL_TOKENS)


@given(st.lists(st.integers(2, 30), max_size=40), st.integers(1, 7))
def test_every_text_is_in_exactly_one_piece_of_its_own_bucket(lengths, piece_pairs):
    request = request_of(lengths)

    pieces = pieces_of(request, piece_pairs)

    assert sorted(pair for piece in pieces for pair in piece.pairs) == list(range(len(lengths)))
    for piece in pieces:
        assert 0 < piece.num_pairs <= piece_pairs
        assert {padded_length(lengths[pair]) for pair in piece.pairs} == {piece.bucket}
        assert list(piece.images) == ["img"]
        assert piece.tokens_per_pair == piece.bucket + NUM_VISUAL_TOKENS
        assert piece.num_tokens == piece.num_pairs * piece.tokens_per_pair


@given(st.integers(0, 40), st.integers(1, 7))
def test_every_image_is_in_exactly_one_piece_in_the_order_of_the_candidates(num_images, piece_pairs):
    images = [f"i{number}" for number in range(num_images)]

    pieces = pieces_of(request_of([5], images=images), piece_pairs)

    assert [image for piece in pieces for image in piece.images if image in images] == images
    assert [pair for piece in pieces for pair in piece.pairs] == list(range(num_images))


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_pairs_whose_image_is_missing_are_left_out(is_present):
    [piece] = pieces_of(request_of([5], images=[f"i{n}" for n in range(len(is_present))]), piece_pairs=10)
    piece.slots = np.where(is_present, np.arange(len(is_present)) + 7, -1).astype(np.int32)

    piece.leave_out_missing()

    expected = [number for number, present in enumerate(is_present) if present]
    assert piece.pairs.tolist() == expected
    assert piece.pair_slots().tolist() == [number + 7 for number in expected]


@given(st.integers(1, 5), st.booleans())
def test_all_texts_of_an_image_query_have_the_slot_of_the_image(num_texts, is_present):
    [piece] = pieces_of(request_of([5] * num_texts), piece_pairs=10)
    piece.slots = np.array([3 if is_present else -1], np.int32)

    piece.leave_out_missing()

    assert piece.pairs.tolist() == (list(range(num_texts)) if is_present else [])
    assert piece.pair_slots().tolist() == ([3] * num_texts if is_present else [])
