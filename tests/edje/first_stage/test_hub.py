"""First stages of the hub compared with the library, and saved and loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointTampered
from edje.first_stage.base import save_first_stage
from edje.first_stage.hub import HubFirstStage, load_published_first_stage, published_preparation
from edje.first_stage.load import load_first_stage
from edje.imports.sources import SourceError
from edje.towers.sources import load_tower
from hub_folders import IMAGE_SIZE, write_bert, write_pair_of_encoders

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a red picture", "plain", "a very very very very very very plain picture of a picture", "unheard of"]
KINDS = [("siglip", False), ("siglip", True), ("clip", True)]


@pytest.fixture(scope="module", params=KINDS, ids=["siglip", "siglip-mask", "clip"])
def published(request, tmp_path_factory):
    """The folder, the library's model and its tokenizer."""
    architecture, has_mask = request.param
    folder = tmp_path_factory.mktemp(architecture)
    return folder, *write_pair_of_encoders(folder, architecture, has_mask=has_mask)


def test_similarities_equal_the_librarys(published):
    folder, model, tokenizer = published
    pixels = torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    is_siglip = model.config.model_type == "siglip"
    padding = {"padding": "max_length" if is_siglip else True, "truncation": True, "max_length": 8}
    with torch.inference_mode():
        texts = model.get_text_features(**tokenizer(CAPTIONS, return_tensors="pt", **padding)).pooler_output
        images = model.get_image_features(pixel_values=pixels).pooler_output
        expected = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1).numpy()
        _, pooled = load_tower(f"hub:{folder}").module(pixels)

    first_stage = load_published_first_stage(f"hub:{folder}")

    found = first_stage.caption_vectors(CAPTIONS, []) @ first_stage.image_vectors(pooled.numpy()).T
    assert found == pytest.approx(expected, abs=1e-5)
    assert first_stage.dim == texts.shape[1]
    assert expected.std() > 0.01  # there is something to agree on


@pytest.mark.parametrize(
    ("settings", "preparation"),
    [
        ({}, "lower_case"),
        ({"tokenizer_class": "CLIPTokenizer"}, "lower_case"),
        ({"tokenizer_class": "GemmaTokenizerFast"}, "lower_case"),
        ({"tokenizer_class": "GemmaTokenizer", "do_lower_case": True}, "lower_case"),
        ({"tokenizer_class": "GemmaTokenizer", "do_lower_case": False}, "as_written"),
        ({"tokenizer_class": "SiglipTokenizer", "do_lower_case": True}, "canonical"),
        ({"tokenizer_class": "SiglipTokenizer"}, "canonical"),
        ({"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}, "as_written"),
    ],
)
def test_the_text_preparation_follows_the_published_tokenizer_configuration(settings, preparation):
    assert published_preparation(SimpleNamespace(init_kwargs=settings)) == preparation


@pytest.mark.parametrize(
    ("do_lower_case", "preparation", "reads_capitals"), [(None, "lower_case", True), (False, "as_written", False)]
)
def test_a_published_first_stage_reports_and_applies_its_text_preparation(
    published, tmp_path, do_lower_case, preparation, reads_capitals
):
    folder = shutil.copytree(published[0], tmp_path / "published")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | ({} if do_lower_case is None else {"do_lower_case": do_lower_case})
    path.write_text(json.dumps(settings))

    first_stage = load_published_first_stage(str(folder))

    assert first_stage.config.text_preparation == preparation
    plain, capitals, punctuated = first_stage.caption_vectors(["a red picture", "A RED picture", "a red, picture"], [])
    assert (np.abs(capitals - plain).max() < 1e-6) == reads_capitals
    assert np.abs(punctuated - plain).max() > 1e-3  # this tokenizer knows no "red,"


def test_a_canonical_preparation_removes_punctuation(published):
    first_stage = load_published_first_stage(str(published[0]))
    first_stage.config = replace(first_stage.config, text_preparation="canonical")

    plain, written = first_stage.caption_vectors(["a red picture", "A RED, picture!"], [])

    assert written == pytest.approx(plain, abs=1e-6)


def test_a_saved_first_stage_is_loaded_without_the_published_folder(published, tmp_path):
    folder, *_ = published
    first_stage = load_published_first_stage(str(folder))
    pooled = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    save_first_stage(tmp_path, first_stage)

    loaded = load_first_stage(tmp_path)

    assert isinstance(loaded, HubFirstStage)
    assert loaded.config == first_stage.config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded.caption_vectors(CAPTIONS, []) == first_stage.caption_vectors(CAPTIONS, [])).all()
    assert (loaded.image_vectors(pooled) == first_stage.image_vectors(pooled)).all()


def test_a_caption_does_not_depend_on_the_others(published):
    folder, *_ = published
    first_stage = load_published_first_stage(str(folder))

    together = first_stage.caption_vectors(CAPTIONS, [])
    alone = np.concatenate([first_stage.caption_vectors([caption], []) for caption in CAPTIONS])

    assert together == pytest.approx(alone, abs=1e-5)


@pytest.fixture
def saved(tmp_path):
    write_pair_of_encoders(tmp_path / "published", "siglip")
    save_first_stage(tmp_path, load_published_first_stage(str(tmp_path / "published")))
    return tmp_path


def test_a_changed_tokenizer_is_refused(saved):
    path = saved / "first_stage" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("red", "der"))

    with pytest.raises(CheckpointTampered, match="not as it was saved"):
        load_first_stage(saved)


def test_a_folder_without_its_tokenizer_is_refused(saved):
    for path in (saved / "first_stage" / "tokenizer").iterdir():
        path.unlink()
    (saved / "first_stage" / "tokenizer").rmdir()

    with pytest.raises(CheckpointIncomplete, match="copy the whole folder again"):
        load_first_stage(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "blip"}, "does not describe a first stage that this version can load: architecture"),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4}}, "weights of another first stage"),
    ],
)
def test_another_architecture_is_refused_with_the_cause(saved, change, words):
    path = saved / "first_stage" / "config.json"
    envelope = json.loads(path.read_text())
    envelope["config"] |= change
    path.write_text(json.dumps(envelope))

    with pytest.raises(CheckpointMismatch, match=words):
        load_first_stage(saved)


def test_a_model_without_a_text_encoder_is_refused(tmp_path):
    write_bert(tmp_path / "bert")

    with pytest.raises(SourceError, match="is a bert: a first stage of kind 'hub' is one of siglip, clip"):
        load_published_first_stage(str(tmp_path / "bert"))


def test_a_missing_model_is_reported_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(SourceError, match=r"cannot be loaded \(.*give a local folder with"):
        load_published_first_stage("hub:nobody/nothing-of-the-kind")
