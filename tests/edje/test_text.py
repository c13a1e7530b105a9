"""Captions to ids."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.checkpoint import CheckpointMismatch
from edje.init import write_untrained
from edje.model.variants import VARIANTS
from edje.text import Tokenizer, canonical_caption
from edje.vocabulary import VocabularyError, character_tokenizer, wordpiece_tokenizer

CLS, SEP, UNK = 2, 3, 1


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(character_tokenizer().to_str(), VARIANTS["tiny"])


def test_a_caption_is_lower_cased_and_loses_its_punctuation():
    assert canonical_caption("  A dog's  RUN_to the beach!? ") == "a dogs run to the beach"


def test_a_caption_is_framed_by_cls_and_sep(tokenizer):
    ids = tokenizer.encode("dog")

    assert (ids[0], ids[-1], len(ids)) == (CLS, SEP, 5)
    assert UNK not in ids


def test_an_empty_caption_is_cls_and_sep(tokenizer):
    assert tokenizer.encode("") == [CLS, SEP]


def test_a_canonical_caption_ignores_capitals_punctuation_and_accents(tokenizer):
    assert tokenizer.encode("A Dog, réally.") == tokenizer.encode("a dog really")


@pytest.mark.parametrize("text", ["a dog [SEP] a cat", "[CLS]", "[MASK]", "<image>", "[PAD]"])
def test_a_caption_cannot_spell_a_special_token(text):
    spelled_out = Tokenizer(
        character_tokenizer().to_str(),
        parse_without_canonical_captions(),
    )

    inner = spelled_out.encode(text)[1:-1]

    assert all(token > 4 for token in inner)
    assert character_tokenizer().get_vocab_size() - 1 not in inner


def parse_without_canonical_captions():
    from dataclasses import replace

    tiny = VARIANTS["tiny"]
    return replace(tiny, preprocess=replace(tiny.preprocess, canonical_captions=False))


@pytest.mark.parametrize("text", ["x " * 500, "y" * 90 + " z" * 100, "w " * 2_000_000], ids=["words", "word", "huge"])
def test_a_long_caption_is_cut_to_61_pieces(tokenizer, text):
    ids = tokenizer.encode(text)

    assert (ids[0], ids[-1], len(ids)) == (CLS, SEP, 63)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_tokenises_within_the_limits(tokenizer, text):
    ids = tokenizer.encode(text)

    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert len(ids) <= tokenizer.max_text_tokens
    assert max(ids) < VARIANTS["tiny"].joint.vocab_size


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(CheckpointMismatch, match="another model"):
        Tokenizer(character_tokenizer().to_str(), VARIANTS["paper-l16"])


def write_vocabulary(folder: Path, *extra: str) -> Path:
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "run", "##ning", *extra]) + "\n")
    return path


def test_a_vocabulary_file_makes_word_pieces(tmp_path):
    write_untrained(VARIANTS["tiny"], tmp_path / "model", seed=0, vocabulary=write_vocabulary(tmp_path))

    assert Tokenizer.load(tmp_path / "model").encode("Dog running") == [2, 5, 6, 7, 3]


def test_the_image_token_is_appended_to_a_vocabulary(tmp_path):
    assert wordpiece_tokenizer(write_vocabulary(tmp_path)).token_to_id("<image>") == 8


@pytest.mark.parametrize("content", [b"dog\ncat\n", b"\xff\xfe\x00", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\ndog\n"])
def test_an_invalid_vocabulary_file_is_refused(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content)

    with pytest.raises(VocabularyError, match="vocabulary"):
        wordpiece_tokenizer(tmp_path / "vocab.txt")


def test_reading_text_does_not_import_torch():
    script = "import sys, edje.text; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]).returncode == 0


TEXTS = st.lists(st.text(max_size=80) | st.sampled_from(["a dog", "собака", "🐕", "???", "  ", "x" * 500]), max_size=6)


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_texts_encoded_together_have_the_ids_they_have_alone(tokenizer, texts):
    batch = tokenizer.encode_batch(texts)

    assert [list(encoded.ids) for encoded in batch] == [tokenizer.encode(text) for text in texts]
    assert [encoded.num_unknown for encoded in batch] == [tokenizer.encode(text).count(UNK) for text in texts]


def test_a_batch_reports_what_is_unknown_and_what_is_cut(tokenizer):
    known, unknown, empty, long, huge = tokenizer.encode_batch(["dog", "🐕 🐈", " ?! ", "dog " * 60, "d" * 100_000])

    assert (known.num_pieces, known.num_unknown, known.is_cut) == (3, 0, False)
    assert (unknown.num_pieces, unknown.num_unknown) == (2, 2)
    assert empty.num_pieces == 0
    assert (long.is_cut, len(long.ids)) == (True, tokenizer.max_text_tokens)
    assert huge.is_cut


def test_words_name_the_positions_of_their_pieces(tokenizer):
    assert tokenizer.words("A red dog!") == [("a", [1]), ("red", [2, 3, 4]), ("dog", [5, 6, 7])]
    assert tokenizer.words("") == []
    positions = [position for _, each in tokenizer.words("dog " * 60) for position in each]
    assert positions == list(range(1, tokenizer.max_text_tokens - 1))


@pytest.mark.parametrize("text", ["", "  ", "???", "🐕", "\N{BOM}", "狗在跑", "\ud83d", "\n\t"])
def test_a_text_without_a_known_piece_is_not_understood(tokenizer, text):
    [encoded] = tokenizer.encode_batch([text])

    assert not encoded.is_understood(text)


@pytest.mark.parametrize("text", ["dog", "🐕 dog", "d", "собака", "5"])
def test_a_text_with_a_known_piece_is_understood(tokenizer, text):
    [encoded] = tokenizer.encode_batch([text])

    assert encoded.is_understood(text)


def test_punctuation_is_not_understood_even_where_the_vocabulary_has_it():
    tokenizer = Tokenizer(character_tokenizer().to_str(), parse_without_canonical_captions())

    [encoded] = tokenizer.encode_batch(["???"])

    assert encoded.num_unknown < encoded.num_pieces
    assert not encoded.is_understood("???")


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("text", ["dog \ud83d", "\udc15\ud83d", "\ud83d\udc15 dog", "a\ud800" * 3000])
def test_half_an_emoji_in_a_text_raises_no_error(text, canonical):
    config = VARIANTS["tiny"] if canonical else parse_without_canonical_captions()
    tokenizer = Tokenizer(character_tokenizer().to_str(), config)

    ids = tokenizer.encode(text)

    assert list(tokenizer.encode_batch([text, "dog"])[0].ids) == ids
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert tokenizer.words(text) is not None
    assert len(tokenizer.token_positions(text, [0])) == 1
