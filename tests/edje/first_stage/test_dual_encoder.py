"""The local first stage: its embeddings, and its folder in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointMissing, CheckpointTampered
from edje.first_stage.base import save_first_stage
from edje.first_stage.dual_encoder import DualEncoder, DualEncoderConfig
from edje.first_stage.load import load_first_stage
from edje.model.initialisation import initialise

CLS, SEP = 2, 3
BAG = DualEncoderConfig(dim=8, vocab_size=20, image_dim=6, text_dim=8, num_heads=2, max_positions=12)
ENCODER = replace(BAG, num_layers=2)
WORDS = st.lists(st.integers(4, 19), min_size=1, max_size=8)

every_kind = pytest.mark.parametrize("config", [BAG, ENCODER], ids=["bag", "encoder"])


def model_of(config, seed=0):
    model = DualEncoder(config)
    initialise(model, seed)
    with torch.no_grad():  # words that count differently, embeddings of some size
        model.word_weights.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed))
        model.words.weight.mul_(20)
    return model.eval().requires_grad_(False)


def captions(*words):
    return [[CLS, *each, SEP] for each in words]


def vectors_of(model, ids):
    return model.caption_vectors([""] * len(ids), ids)


@every_kind
def test_embeddings_of_both_sides_have_unit_length(config):
    model = model_of(config)

    texts = vectors_of(model, captions([4, 5], [6], [7, 8, 9]))
    images = model.image_vectors(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float16))

    assert texts.shape == (3, 8)
    assert images.shape == (4, 8)
    for vectors in (texts, images):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-5)


@every_kind
@settings(deadline=None, max_examples=25)
@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(0, 19))
def test_padding_tokens_do_not_change_the_vector(config, words, pad):
    model = model_of(config)
    ids = captions(*words)
    lengths = torch.tensor([len(each) for each in ids])
    longest = int(lengths.max()) + 1
    padded = torch.tensor([[*each, *[pad] * (longest - len(each))] for each in ids])

    together = model.embed_texts(padded, lengths).numpy()

    assert together == pytest.approx(vectors_of(model, ids), abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(WORDS, st.randoms(use_true_random=False))
def test_a_bag_of_words_ignores_order_and_repetition(words, random):
    model = model_of(BAG)
    shuffled = random.sample(words, len(words))

    one, reordered, repeated = vectors_of(model, captions(words, shuffled, words + words[:1]))

    assert reordered == pytest.approx(one, abs=1e-5)
    assert repeated == pytest.approx(one, abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(WORDS)
def test_a_bag_of_words_is_their_weighted_sum_with_weights_of_unit_length(words):
    model = model_of(BAG)
    known = sorted({CLS, *words, SEP})
    weights = model.word_weights[known] / model.word_weights[known].norm()

    expected = model.text_out(weights @ model.words.weight[known])

    [found] = vectors_of(model, captions(words))
    assert found == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)


def test_a_text_encoder_distinguishes_the_same_words_in_another_order():
    model = model_of(ENCODER)

    one, other = vectors_of(model, captions([4, 5, 6], [6, 5, 4]))

    assert np.abs(one - other).max() > 1e-3


def test_the_image_power_reduces_large_values_and_keeps_their_sign():
    model = model_of(replace(BAG, image_power=0.5))
    pooled = np.array([[4.0, -9.0, 0.0, 1.0, 16.0, -1.0]], np.float32)

    expected = model_of(BAG).image_vectors(np.array([[2.0, -3.0, 0.0, 1.0, 4.0, -1.0]], np.float32))

    assert model.image_vectors(pooled) == pytest.approx(expected, abs=1e-6)


# The folder in a checkpoint


@pytest.fixture
def saved(tmp_path):
    save_first_stage(tmp_path, model_of(ENCODER))
    return tmp_path


@every_kind
def test_a_saved_encoder_is_loaded_unchanged_and_frozen(config, tmp_path):
    model = model_of(config, seed=3)
    save_first_stage(tmp_path, model)

    loaded = load_first_stage(tmp_path)

    assert isinstance(loaded, DualEncoder)
    assert loaded.config == config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    ids = captions([4, 9], [5])
    assert (vectors_of(loaded, ids) == vectors_of(model, ids)).all()


def test_a_checkpoint_without_a_first_stage_is_reported(tmp_path):
    with pytest.raises(CheckpointMissing, match="has no first stage"):
        load_first_stage(tmp_path)


def test_changed_weights_are_refused(saved):
    path = saved / "first_stage" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointTampered, match="not the file that was saved"):
        load_first_stage(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_half_copied_folder_is_refused(saved, name):
    path = saved / "first_stage" / name
    if name == "config.json":
        path.write_text(path.read_text()[:40])
    else:
        path.unlink()

    with pytest.raises(CheckpointIncomplete, match="copy the whole folder again"):
        load_first_stage(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 9}, "weights of another first stage"),
        ({"num_layers": 1}, "weights of another first stage"),
        ({"colour": 1}, "does not describe a first stage that this version can load: colour"),
        ({"dim": -1}, "does not describe a first stage that this version can load: dim"),
        ({"num_heads": 3}, "is no multiple of num_heads 3"),
    ],
)
def test_another_architecture_is_refused_with_the_cause(saved, change, words):
    path = saved / "first_stage" / "config.json"
    envelope = json.loads(path.read_text())
    envelope["config"] |= change
    path.write_text(json.dumps(envelope))

    with pytest.raises(CheckpointMismatch, match=words):
        load_first_stage(saved)


def test_an_existing_folder_is_not_overwritten(saved):
    with pytest.raises(FileExistsError):
        save_first_stage(saved, model_of(BAG))
