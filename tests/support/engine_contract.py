"""The contract suite of every engine, with its helpers.

A test module subclasses `EngineContract` and defines a fixture `engine`. Knows no runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from protocols.quantize import quantize
from trt.contract import LimitExceeded, TokenSlab

NUM_SLOTS, MAX_PAIRS, MAX_IMAGES = 24, 48, 12
SIZES = {"num_slots": NUM_SLOTS, "max_pairs": MAX_PAIRS, "max_images": MAX_IMAGES}
DOG, CAT = [2, 40, 41, 42, 3], [2, 43, 44, 3]
LATE_FUSION = ("tiny-late", "tiny-minimal", "tiny-maxsim")

#: How far a logit may move with its batch, by the layers' type. Logits of the untrained model spread over about 1.
#: Measured with AVX512: 1e-6 in float32 (2e-6 at the paper's size) and 1e-6 in bf16; other processors may choose
#: other kernels for other batch sizes.
BATCH_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}


def fill(slab: TokenSlab, storage: str, slots: Sequence[int], tokens: Iterable[np.ndarray]) -> None:
    """Quantise tokens and publish them in slots, as the rerank worker publishes decoded blobs."""
    rows_tokens, rows_scales, rows = slab.stage(slots)
    for row, image in zip(rows, tokens, strict=True):
        values, scales = quantize(storage, image)  # type: ignore[arg-type]
        rows_tokens[row] = np.frombuffer(values, np.uint8)
        rows_scales[row] = np.frombuffer(scales, np.uint8)
    slab.publish(slots, rows)


def fill_slots(engine: Any, slots: Sequence[int], tokens: Iterable[np.ndarray]) -> None:
    """`fill` the slab of an engine."""
    fill(engine.slab, engine.info.storage, slots, tokens)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def all_scores(engine: Any, texts: Sequence[Sequence[int]], num_images: int) -> np.ndarray:
    """The logits of every text with the images in slots 0 to `num_images` - 1: (texts, images)."""
    query, slot = np.divmod(np.arange(len(texts) * num_images, dtype=np.int32), num_images)
    scores = engine.score_pairs(engine.encode_queries(texts), query, slot)
    return scores.reshape(len(texts), num_images)


class EngineContract:
    """Tests that every engine over a checkpoint of the size of `tiny` passes."""

    def test_an_image_becomes_finite_tokens_of_the_announced_shape(self, engine, pixels):
        tokens, pooled = engine.encode_images(pixels[:3])

        assert tokens.shape == (3, engine.info.num_visual_tokens, engine.info.token_dim)
        assert pooled.shape == (3, 64)
        assert tokens.dtype == pooled.dtype == np.float32
        assert np.isfinite(tokens).all()
        assert np.abs(tokens[0] - tokens[1]).max() > 0.01

    def test_equal_images_become_equal_tokens_at_every_index_of_a_batch(self, engine, pixels):
        tokens, _ = engine.encode_images(pixels[[0, 1, 0]])

        np.testing.assert_allclose(tokens[0], tokens[2], atol=1e-4)

    def test_different_pairs_get_different_finite_logits(self, engine, pixels):
        fill_slots(engine, range(6), engine.encode_images(pixels[:6])[0])

        scores = all_scores(engine, [DOG, CAT], 6)

        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        assert len(np.unique(scores)) > 6

    def test_the_same_call_gives_the_same_logits(self, engine, pixels):
        fill_slots(engine, range(6), engine.encode_images(pixels[:6])[0])

        np.testing.assert_array_equal(all_scores(engine, [DOG], 6), all_scores(engine, [DOG], 6))

    def test_a_rewritten_slot_changes_its_score_and_no_other(self, engine, pixels):
        tokens, _ = engine.encode_images(pixels[:4])
        fill_slots(engine, [0, 1, 2], tokens[:3])
        before = all_scores(engine, [DOG], 3)[0]

        fill_slots(engine, [1], tokens[3:])

        after = all_scores(engine, [DOG], 3)[0]
        assert after[1] != before[1]
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])

    def test_slots_may_be_written_and_read_in_any_order(self, engine, pixels):
        tokens, _ = engine.encode_images(pixels[:3])
        fill_slots(engine, [0, 1, 2], tokens)
        in_order = all_scores(engine, [DOG], 3)[0]

        fill_slots(engine, [7, 3, 20], tokens)

        queries = engine.encode_queries([DOG])
        np.testing.assert_array_equal(engine.score_pairs(queries, numbers(0, 0, 0), numbers(7, 3, 20)), in_order)

    def test_a_staged_row_that_is_not_published_changes_no_published_slot(self, engine, pixels):
        tokens, _ = engine.encode_images(pixels[:2])
        fill_slots(engine, [0], tokens[:1])
        before = all_scores(engine, [DOG], 1)
        fill_slots(engine, [5, 6], tokens)

        rows_tokens, _, rows = engine.slab.stage([3, 4])
        rows_tokens[list(rows)] = 255
        engine.slab.publish([], [])

        np.testing.assert_array_equal(all_scores(engine, [DOG], 1), before)

    def test_a_score_depends_on_its_batch_by_rounding_alone(self, engine, pixels):
        texts = [DOG, CAT, [2, *range(30, 60), 3], [2, *range(60, 65), 3]]
        fill_slots(engine, range(12), engine.encode_images(pixels)[0])
        tolerance = BATCH_TOLERANCE[str(getattr(engine, "dtype", "float32")).removeprefix("torch.")]

        together = all_scores(engine, texts, 12)

        for text, scores in zip(texts, together, strict=True):
            queries = engine.encode_queries([text])
            alone = [engine.score_pairs(queries, numbers(0), numbers(slot))[0] for slot in range(12)]
            np.testing.assert_allclose(scores, alone, atol=tolerance)

    def test_the_order_of_pairs_is_the_order_of_logits(self, engine, pixels):
        fill_slots(engine, range(6), engine.encode_images(pixels[:6])[0])
        scores = all_scores(engine, [DOG, CAT], 6)
        queries = engine.encode_queries([DOG, CAT])
        query, slot = numbers(1, 0, 1, 0, 1, 0, 0), numbers(5, 5, 0, 3, 2, 2, 2)

        np.testing.assert_allclose(engine.score_pairs(queries, query, slot), scores[query, slot], atol=0.03)

    def test_no_pairs_give_no_logits(self, engine):
        assert engine.score_pairs(engine.encode_queries([DOG]), numbers(), numbers()).shape == (0,)
        assert engine.score_pairs(engine.encode_queries([]), numbers(), numbers()).shape == (0,)

    @pytest.mark.parametrize(
        ("query", "slot"),
        [
            (numbers(2), numbers(0)),
            (numbers(-1), numbers(0)),
            (numbers(0), numbers(NUM_SLOTS)),
            (numbers(0), numbers(-1)),
            (numbers(0, 0), numbers(0)),
            (numbers(*[0] * (MAX_PAIRS + 1)), numbers(*[0] * (MAX_PAIRS + 1))),
        ],
        ids=["query", "negative query", "slot", "negative slot", "uneven", "too many"],
    )
    def test_invalid_query_and_slot_numbers_are_refused(self, engine, query, slot):
        queries = engine.encode_queries([DOG, CAT])

        with pytest.raises(LimitExceeded):
            engine.score_pairs(queries, query, slot)

    @pytest.mark.parametrize(
        "text", [[], [2] * 64, [2, 1_024, 3], [2, -1, 3]], ids=["empty", "long", "unknown", "negative"]
    )
    def test_texts_the_model_cannot_read_are_refused(self, engine, text):
        with pytest.raises(LimitExceeded):
            engine.encode_queries([DOG, text])

    def test_the_longest_text_gets_a_finite_logit(self, engine):
        assert np.isfinite(all_scores(engine, [[2] * engine.info.max_text_tokens], 1)).all()

    @pytest.mark.parametrize("shape", [(MAX_IMAGES + 1, 3, 64, 64), (1, 3, 32, 64), (1, 64, 64, 3), (3, 64, 64)])
    def test_pixels_of_another_shape_or_too_many_are_refused(self, engine, shape):
        with pytest.raises(LimitExceeded):
            engine.encode_images(np.zeros(shape, np.uint8))

    def test_pixels_that_are_not_bytes_are_refused(self, engine):
        with pytest.raises(LimitExceeded):
            engine.encode_images(np.zeros((1, 3, 64, 64), np.float32))

    def test_read_only_pixels_are_encoded(self, engine, pixels):
        frozen = pixels[:1].copy()
        frozen.flags.writeable = False

        engine.encode_images(frozen)

    def test_warming_up_does_not_change_the_slots(self, engine, pixels):
        fill_slots(engine, range(3), engine.encode_images(pixels[:3])[0])
        before = all_scores(engine, [DOG], 3)

        engine.warm_up()

        np.testing.assert_array_equal(all_scores(engine, [DOG], 3), before)
