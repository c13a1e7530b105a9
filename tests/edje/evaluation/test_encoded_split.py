"""Encoded splits: the checkpoint's first stage, images encoded once for all models of a tower, a limit of captions."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from edje.calibration import Calibration, DirectionCalibration, sigmoid
from edje.checkpoint import CheckpointMissing, read_tokenizer_json
from edje.data.spec import ScenesSpec, open_dataset
from edje.evaluation.encoded_split import encode_split
from edje.evaluation.errors import SplitUnusable
from edje.evaluation.split_evaluation import evaluate_split
from edje.first_stage.base import save_first_stage
from edje.first_stage.dual_encoder import DualEncoder, DualEncoderConfig
from edje.first_stage.load import load_first_stage
from edje.first_stage_scores import of_ranks
from edje.init import write_untrained
from edje.model.initialisation import initialise
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.text import Tokenizer

TINY = VARIANTS["tiny"]
SIZE = TINY.preprocess.image_size


class RecordingSource:
    """The images of another dataset; records each request for pixels."""

    def __init__(self, source):
        self._source = source
        self.requests = []

    def pixels(self, index, size, resample):
        self.requests.append((index, size, resample))
        return self._source.pixels(index, size, resample)


def scenes():
    dataset = open_dataset(ScenesSpec(kind="scenes", test_groups=2), "test", strict=True)
    return replace(dataset, source=RecordingSource(dataset.source))


def checkpoint_in(folder, config=TINY, seed=0, first_stage_layers=1):
    """A model with random weights, and a first stage with random weights unless its layers are None."""
    write_untrained(config, folder, seed=seed)
    if first_stage_layers is not None:
        model = DualEncoder(
            DualEncoderConfig(
                dim=8,
                vocab_size=config.joint.vocab_size,
                image_dim=config.vision.pooled_dim,
                text_dim=16,
                num_layers=first_stage_layers,
                max_positions=config.preprocess.max_text_tokens,
            )
        )
        initialise(model, seed)
        save_first_stage(folder, model.eval())
    return folder


@pytest.fixture
def load(tmp_path):
    def quietly(checkpoint, dataset, storage="none", **options):
        return encode_split(
            checkpoint, dataset, "test", storage, features=tmp_path / "features",
            console=Console(file=io.StringIO()), **options,
        )  # fmt: skip

    return quietly


@pytest.mark.parametrize("layers", [0, 1])
def test_the_checkpoints_first_stage_compares_captions_with_pooled_embeddings(load, tmp_path, layers):
    checkpoint, dataset = checkpoint_in(tmp_path / "model", first_stage_layers=layers), scenes()
    tokenizer = Tokenizer.load(checkpoint)
    model = load_checkpoint(checkpoint).model
    pixels = torch.from_numpy(np.stack([dataset.pixels(number, SIZE) for number in range(8)]))
    visual, pooled = model.encode_images(pixels)

    split = load(checkpoint, dataset)

    assert split.first_stage == "checkpoint"
    assert split.similarity.shape == (40, 8)
    first_stage = load_first_stage(checkpoint)
    images = first_stage.image_vectors(pooled.numpy())
    for number in (0, 7, 39):
        ids = torch.tensor([tokenizer.encode(split.captions[number])])
        text = first_stage.embed_texts(ids, torch.tensor([ids.shape[1]])).numpy()
        # Features are stored in half precision.
        assert split.similarity[number] == pytest.approx((text @ images.T)[0], abs=2e-3)
    assert split.stored.tokens == pytest.approx(visual.numpy(), abs=2e-2)


def test_a_second_model_over_the_same_tower_reads_no_pixels(load, tmp_path):
    dataset = scenes()
    loaded = load_checkpoint(checkpoint_in(tmp_path / "one"))
    with torch.no_grad():
        for parameter in loaded.model.joint.parameters():
            parameter.mul_(1.1)
    save_checkpoint(tmp_path / "two", loaded.config, loaded.model, read_tokenizer_json(tmp_path / "one"))
    save_first_stage(tmp_path / "two", load_first_stage(tmp_path / "one"))
    one = load(tmp_path / "one", dataset)
    num_requests = len(dataset.source.requests)

    two = load(tmp_path / "two", dataset)

    assert len(dataset.source.requests) == num_requests == 8
    assert two.model_digest != one.model_digest
    assert (two.similarity == one.similarity).all()


def test_images_are_resampled_as_the_configuration_says(load, tmp_path):
    dataset = scenes()
    bicubic = replace(TINY, preprocess=replace(TINY.preprocess, resample="bicubic"))

    load(checkpoint_in(tmp_path / "model", bicubic), dataset)

    assert set(dataset.source.requests) == {(number, SIZE, "bicubic") for number in range(8)}


@pytest.mark.parametrize("storage", ["fp16", "bf16", "int8", "int4"])
def test_the_first_stage_does_not_depend_on_the_storage(load, tmp_path, storage):
    checkpoint, dataset = checkpoint_in(tmp_path / "model"), scenes()

    exact, stored = load(checkpoint, dataset), load(checkpoint, dataset, storage)

    assert (exact.similarity == stored.similarity).all()
    assert len(stored.stored.blobs) == 8


def test_a_checkpoint_without_a_first_stage_is_an_error_before_any_pixels_are_read(load, tmp_path):
    dataset = scenes()

    with pytest.raises(CheckpointMissing, match="has no first stage"):
        load(checkpoint_in(tmp_path / "model", first_stage_layers=None), dataset)

    assert dataset.source.requests == []


def test_the_error_for_an_unknown_first_stage_lists_the_known_ones(load, tmp_path):
    with pytest.raises(SplitUnusable, match=r"unknown first stage 'best': choose checkpoint, maxsim, or a \.npy file"):
        load(tmp_path, scenes(), first_stage="best")


# A limit of captions


def report_of(split, num_captions, scorer="torch"):
    with Progress(console=Console(file=io.StringIO())) as bars:
        return evaluate_split(
            split, scorer, ("text-to-image", "image-to-text"), [3],
            num_resamples=2, seed=0, bars=bars, num_captions=num_captions,
        )  # fmt: skip


def test_a_limit_takes_captions_evenly_and_keeps_all_images_as_candidates(load, tmp_path):
    split = load(checkpoint_in(tmp_path / "model"), scenes())

    report = report_of(split, 10)

    limited, images = (result.comparison for result in report.results)
    assert (limited.num_queries, limited.num_candidates) == (10, 8)
    assert (images.num_queries, images.num_candidates) == (8, 40)
    assert report.data == "scenes test, 10 of 40 captions as queries"
    positive = split.similarity[np.arange(40), split.image_of_caption]
    ranks = (split.similarity > positive[:, None]).sum(axis=1)
    assert limited.row("R@1").first_stage.value == pytest.approx((ranks[::4] == 0).mean())


@pytest.mark.parametrize("num_captions", [None, 40, 1000])
def test_all_captions_are_queries_if_the_limit_is_not_below_their_number(load, tmp_path, num_captions):
    split = load(checkpoint_in(tmp_path / "model"), scenes())

    report = report_of(split, num_captions)

    assert report.data == "scenes test"
    assert report.results[0].comparison.num_queries == 40


def test_a_limit_keeps_the_captions_numbers(load, tmp_path):
    split = load(checkpoint_in(tmp_path / "model"), scenes())
    right = replace(split, scorers={"torch": lambda: lambda c, i: (split.image_of_caption[c] == i).astype(np.float32)})

    limited = report_of(right, 7).results[0].comparison

    assert limited.row("R@1").reranked.value == limited.row("R@3").first_stage.value


# Calibration


GAIN = DirectionCalibration(temperature=2.0, offset=-1.0, first_stage_gain=3.0)


def calibrated(split, text_to_image=GAIN, image_to_text=GAIN):
    return replace(split, calibration=Calibration(text_to_image, image_to_text))


def test_each_direction_is_ordered_by_the_log_odds_of_its_constants(load, tmp_path):
    split = load(checkpoint_in(tmp_path / "model"), scenes())
    reversed_order = {"torch": lambda: lambda captions, images: -split.similarity[captions, images]}
    constants = replace(GAIN, first_stage_gain=1e6), replace(GAIN, first_stage_gain=0.0)

    report = report_of(calibrated(replace(split, scorers=reversed_order), *constants), None)

    by_first_stage, by_logits = (result.comparison for result in report.results)
    assert (by_first_stage.better.value, by_first_stage.worse.value) == (0, 0)
    assert by_logits.worse.value > 0


@pytest.mark.parametrize("num_captions", [None, 7])
def test_each_candidate_gets_the_first_stage_score_of_its_rank(load, tmp_path, num_captions):
    split = load(checkpoint_in(tmp_path / "model"), scenes())
    logits = {"torch": lambda: lambda captions, images: np.zeros(len(captions), np.float32)}

    result = report_of(calibrated(replace(split, scorers=logits)), num_captions).results[0]

    # With equal logits the first stage alone decides, and each query has the same three probabilities.
    assert result.comparison.worse.value == 0
    assert [each.mean_probability for each in result.reliability.bins] == pytest.approx(
        sigmoid(1.5 * of_ranks(np.array([3, 2, 1])) - 1), abs=1e-6
    )


def test_requests_without_scores_in_random_order_rank_worse_and_are_in_the_report(load, tmp_path):
    split = load(checkpoint_in(tmp_path / "model"), scenes())
    known = {"torch": lambda: lambda c, i: (split.image_of_caption[c] == i).astype(np.float32)}

    result = report_of(calibrated(replace(split, scorers=known)), None).results[0]

    assert result.shuffled.row("R@1").reranked.value < result.comparison.row("R@3").reranked.value
    assert result.shuffled.row("R@3") == result.comparison.row("R@3")


def test_a_model_that_reads_no_scores_has_no_row_without_them(load, tmp_path):
    split = load(checkpoint_in(tmp_path / "model"), scenes())
    reads_none = calibrated(split, replace(GAIN, first_stage_gain=0.0), replace(GAIN, first_stage_gain=0.0))

    for one in (split, reads_none):
        assert [result.shuffled for result in report_of(one, None).results] == [None, None]


def test_only_scorers_of_the_models_logits_have_probabilities(load, tmp_path):
    tiny = replace(TINY, joint=replace(TINY.joint, kind="minimal", text_layers=1, visual_layers=1, match_dim=8))
    split = calibrated(load(checkpoint_in(tmp_path / "model", tiny), scenes()))

    has_probabilities = {
        scorer: [result.reliability is not None for result in report_of(split, None, scorer).results]
        for scorer in ("torch", "maxsim", "cascade:2")
    }

    assert has_probabilities == {"torch": [True, True], "maxsim": [False, False], "cascade:2": [False, False]}


def test_a_cascade_with_a_budget_of_all_candidates_ranks_as_the_calibrated_model(load, tmp_path):
    tiny = replace(TINY, joint=replace(TINY.joint, kind="minimal", text_layers=1, visual_layers=1, match_dim=8))
    split = calibrated(load(checkpoint_in(tmp_path / "model", tiny), scenes()))

    model, cascade = report_of(split, 9), report_of(split, 9, "cascade:3")

    for one, other in zip(model.results, cascade.results, strict=True):
        assert one.comparison == other.comparison
