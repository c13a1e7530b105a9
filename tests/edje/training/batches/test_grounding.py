"""Batches of whole groups, region labels and grounding labels of drawn scenes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.data.dataset import GroundingRole, LabelledSource
from edje.data.scenes.dataset import scenes
from edje.data.scenes.world import COLOURS
from edje.model.variants import VARIANTS
from edje.text import Tokenizer, canonical_caption
from edje.training.batches.corpus import encode_captions
from edje.training.batches.grounding import GroundingLabeller
from edje.training.batches.plan import CaptionOrder
from edje.training.losses import regions_loss
from edje.vocabulary import caption_tokenizer


@settings(max_examples=30, deadline=None)
@given(num_groups=st.integers(2, 8), size=st.integers(1, 4), num_captions=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_batch_of_groups_holds_whole_ones_and_an_epoch_every_caption_once(num_groups, size, num_captions, seed):
    images = np.repeat(np.arange(num_groups * size), num_captions)
    groups = images // size
    order = CaptionOrder(len(images), size, seed, images, groups)

    batches = [order.batch(step) for step in range(order.steps_per_epoch)]

    assert sorted(np.concatenate(batches)) == list(range(len(images)))
    for batch in batches:
        assert len(set(groups[batch])) == 1
        assert len(set(images[batch])) == size


def test_an_epoch_is_repeatable_and_the_next_one_differs():
    images = np.repeat(np.arange(40), 5)
    first, again = (CaptionOrder(200, 20, 3, images, images // 4) for _ in range(2))

    np.testing.assert_array_equal(first.batch(3), again.batch(3))
    assert (first.batch(3) != first.batch(3 + first.steps_per_epoch)).any()


def test_region_labels_are_the_objects_of_the_cells():
    source = scenes("dev", 0, num_groups=2).source

    assert isinstance(source, LabelledSource)
    for number, scene in enumerate(source.scenes):
        labels = source.labels(number)
        assert labels.shape == (9, 4)
        assert (labels < np.array(source.label_sizes)).all()
        occupied = {thing.row * 3 + thing.column for thing in scene.things}
        assert set(np.flatnonzero(labels.any(axis=1))) == occupied
        assert (labels[sorted(occupied)] > 0).all()


def test_grounding_labels_are_right_for_the_scene_of_the_caption_and_for_another():
    data = scenes("dev", 0, num_groups=40)
    directions = {"left": (1, -1), "right": (1, 1), "above": (0, -1), "over": (0, -1)}
    num_relations = {True: 0, False: 0}
    for number, image in enumerate(data.images):
        for other in (number, number ^ 1):
            things = {thing.row * 3 + thing.column: thing for thing in data.source.scenes[other].things}
            for caption in map(canonical_caption, image.captions):
                found = {role: {} for role in GroundingRole}
                for char, role, value in data.source.grounding_labels(other, caption):
                    found[role][char] = value
                for char, cell in found[GroundingRole.NAMED].items():
                    before, word = caption[:char].split()[-1], caption[char:].split()[0]
                    assert (things[cell].colour, things[cell].shape) == (before, word)
                for char, is_true in found[GroundingRole.HOLDS].items():
                    axis, sign = directions.get(caption[char:].split()[0], (0, 1))
                    subject, object_cell = found[GroundingRole.SUBJECT][char], found[GroundingRole.OBJECT][char]
                    apart = np.subtract(divmod(subject, 3), divmod(object_cell, 3))[axis]
                    assert (apart * sign > 0) == bool(is_true), caption
                    num_relations[bool(is_true)] += 1
                    assert is_true or other != number
    assert min(num_relations.values()) > 300


def test_objects_that_the_scene_lacks_have_no_grounding_label():
    source = scenes("dev", 0, num_groups=1).source
    thing, other = source.scenes[0].things[:2]

    for caption in ("a mauve circle left of a cube", "left", "", "a red star is above"):
        assert all(label.role == GroundingRole.NAMED for label in source.grounding_labels(0, caption))
    absent = next(colour for colour in COLOURS if colour not in {each.colour for each in source.scenes[0].things})
    labels = source.grounding_labels(0, f"a {thing.colour} {thing.shape} left of an {absent} {other.shape}")
    assert [label.role for label in labels] == [GroundingRole.NAMED]


def test_a_caption_is_also_read_with_an_image_for_which_a_relation_does_not_hold():
    data = scenes("dev", 0, num_groups=6)
    captions, labeller = grounding_labeller(data, 37)
    first = np.flatnonzero(np.append(True, captions.images[1:] != captions.images[:-1]))  # one caption of each image

    found = labeller(first, captions.images[first])

    num = len(first)
    is_relation = found.labels[:, 2] == GroundingRole.HOLDS
    own, other = (
        found.labels[is_relation & (found.labels[:, 0] < num)],
        found.labels[is_relation & (found.labels[:, 0] >= num)],
    )
    assert own[:, 3].all()
    bases = 4 * np.arange(6)  # their confusers in other cells come next
    has_relation = np.isin(bases, own[:, 0])
    assert has_relation.any()
    assert np.isin(bases[has_relation] + num, other[other[:, 3] == 0, 0]).all()
    assert ((found.other_sample - np.arange(num)) % num <= 3).all()


def test_grounding_labels_have_token_positions_and_truncated_tokens_none():
    data = scenes("dev", 0, num_groups=2)
    captions, labeller = grounding_labeller(data, 37)
    numbers = np.array([7, 3])

    rows = labeller(numbers, captions.images[numbers]).labels

    for pair, number in enumerate(numbers):
        text = canonical_caption(captions.texts[number])
        expected = [
            (text[:char].count(" ") + 1, role, value)  # after [CLS]; each word of these captions is one token
            for char, role, value in data.source.grounding_labels(captions.images[number], text)
        ]
        assert [tuple(each) for each in rows[rows[:, 0] == pair][:, 1:]] == expected
    cut = grounding_labeller(data, 6)[1](numbers, captions.images[numbers]).labels
    assert len(cut) < len(rows)
    assert cut[:, 1].max(initial=0) <= 6


def grounding_labeller(data, max_caption_pieces):
    words = caption_tokenizer(caption for image in data.images for caption in image.captions)
    base = next(iter(VARIANTS.values()))
    config = replace(
        base,
        preprocess=replace(base.preprocess, max_caption_pieces=max_caption_pieces),
        joint=replace(base.joint, vocab_size=words.get_vocab_size(), sep_id=words.token_to_id("[SEP]")),
    )
    tokenizer = Tokenizer(words.to_str(), config)
    captions = encode_captions(data, tokenizer, np.arange(len(data.images)))
    return captions, GroundingLabeller(data.source, captions, tokenizer)


def test_the_regions_loss_is_the_sum_over_labels_of_the_mean_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 9, size, generator=generator) for size in (7, 5)]
    labels = torch.stack([torch.randint(0, size, (3, 9), generator=generator) for size in (7, 5)], dim=-1)

    loss = regions_loss(logits, labels)

    plain = 0.0
    for number, each in enumerate(logits):
        chances = torch.softmax(each.double(), dim=-1)
        right = torch.gather(chances, 2, labels[..., number : number + 1])
        plain -= right.log().mean().item()
    assert loss.item() == pytest.approx(plain, abs=1e-5)
