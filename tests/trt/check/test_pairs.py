"""The pairs that engines are compared on."""

import numpy as np
import pytest
from PIL import Image

from edje.model.variants import VARIANTS
from edje.text import Tokenizer
from edje.vocabulary import character_tokenizer
from trt.check.pairs import logits_of, parity_pairs
from trt.contract import EngineUnavailable
from trt.parity import ParityFailed

TINY = VARIANTS["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(character_tokenizer().to_str(), TINY)


def test_without_a_tokenizer_pairs_are_random_and_the_summary_names_the_kind():
    held = parity_pairs(TINY, None, num_texts=7, num_images=3)

    assert held.summary == "random pictures and texts"
    assert held.pixels.shape == (3, 3, 64, 64)
    assert [len(text) for text in held.texts][:: len(held.texts) - 1] == [2, 63]
    assert len({image.tobytes() for image in held.pixels}) == 3


def test_with_one_that_knows_their_words_they_are_drawn_scenes(tokenizer):
    held = parity_pairs(TINY, tokenizer, num_texts=12, num_images=4)

    assert held.summary.startswith("drawn scenes")
    assert held.pixels.shape == (4, 3, 64, 64)
    assert len(held.texts) == 12
    lengths = [len(text) for text in held.texts]
    assert {2, 63} <= set(lengths)
    assert len({text[-1] for text in held.texts}) == 1  # every text, cut or not, ends with [SEP]


def test_pairs_are_the_same_every_time(tokenizer):
    one, other = (parity_pairs(TINY, tokenizer, num_texts=6, num_images=2) for _ in range(2))

    assert one.texts == other.texts
    np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_tokenizer_without_their_words_gets_random_ones():
    class Foreign:
        def encode(self, text):
            return [2, 1, 3]

        def token_id(self, token):
            return {"[UNK]": 1}[token]

    assert parity_pairs(TINY, Foreign(), num_texts=3, num_images=2).summary == "random pictures and texts"


def test_the_error_for_tokens_that_cannot_be_stored_names_the_image():
    class Broken:
        class info:
            runtime, storage, max_images = "broken", "int8", 2

        class slab:
            @staticmethod
            def stage(slots):
                return np.zeros((9, 64), np.uint8), np.zeros((9, 4), np.uint8), slots

            @staticmethod
            def publish(slots, rows):
                pass

        @staticmethod
        def encode_images(pixels):
            tokens = np.ones((len(pixels), 1, 64), np.float32)
            tokens[1] = np.nan
            return tokens, tokens[:, 0]

    with pytest.raises(ParityFailed, match="the broken engine's tokens of image 1"):
        logits_of(Broken(), parity_pairs(TINY, None, num_texts=2, num_images=2))


def test_photographs_of_a_folder_are_used_with_their_captions(tmp_path):
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "captions.txt").write_text("a dog\n\na red cat\n")

    held = parity_pairs(TINY, Letters(), num_texts=5, num_images=3, folder=tmp_path)
    random = parity_pairs(TINY, None, num_texts=5, num_images=9, folder=tmp_path)

    assert held.pixels.shape == (3, 3, 64, 64)
    assert held.texts == ((2, 5, 3), (2, 9, 3))
    assert held.summary == f"3 photographs of {tmp_path}"
    assert (len(random.pixels), len(random.texts)) == (4, 5)


def test_a_folder_without_photographs_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")

    with pytest.raises(EngineUnavailable, match="holds 0 images that can be decoded, and 2 are needed"):
        parity_pairs(TINY, None, num_texts=5, num_images=3, folder=tmp_path)


class Letters:
    def encode(self, text):
        return [2, len(text), 3]
