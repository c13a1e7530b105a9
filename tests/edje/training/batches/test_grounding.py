"""Groups that stand together in a batch, and what stands in each region of a drawn picture."""

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
from edje.training.batches.grounding import ClaimReader
from edje.training.batches.sampling import Epochs
from edje.training.corpus import read_captions
from edje.training.losses import regions_loss
from edje.vocabulary import caption_tokenizer


@settings(max_examples=30, deadline=None)
@given(num_groups=st.integers(2, 8), size=st.integers(1, 4), num_captions=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_batch_of_groups_holds_whole_ones_and_an_epoch_every_caption_once(num_groups, size, num_captions, seed):
    images = np.repeat(np.arange(num_groups * size), num_captions)
    groups = images // size
    epochs = Epochs(len(images), size, seed, images, groups)

    batches = [epochs.batch(step) for step in range(epochs.steps_per_epoch)]

    assert sorted(np.concatenate(batches)) == list(range(len(images)))
    for batch in batches:
        assert len(set(groups[batch])) == 1
        assert len(set(images[batch])) == size


def test_the_same_epoch_has_the_same_order_and_the_next_one_another():
    images = np.repeat(np.arange(40), 5)
    first, again = (Epochs(200, 20, 3, images, images // 4) for _ in range(2))

    np.testing.assert_array_equal(first.batch(3), again.batch(3))
    assert (first.batch(3) != first.batch(3 + first.steps_per_epoch)).any()


def test_drawn_scenes_say_what_stands_in_each_cell():
    source = scenes("dev", 0, num_groups=2).source

    assert isinstance(source, LabelledSource)
    for number, scene in enumerate(source.scenes):
        labels = source.labels(number)
        assert labels.shape == (9, 4)
        assert (labels < np.array(source.label_sizes)).all()
        occupied = {thing.row * 3 + thing.column for thing in scene.things}
        assert set(np.flatnonzero(labels.any(axis=1))) == occupied
        assert (labels[sorted(occupied)] > 0).all()


def test_drawn_scenes_say_what_words_say_of_their_own_picture_and_of_another():
    data = scenes("dev", 0, num_groups=40)
    directions = {"left": (1, -1), "right": (1, 1), "above": (0, -1), "over": (0, -1)}
    num_said = {True: 0, False: 0}
    for number, image in enumerate(data.images):
        for other in (number, number ^ 1):
            things = {thing.row * 3 + thing.column: thing for thing in data.source.scenes[other].things}
            for caption in map(canonical_caption, image.captions):
                said = {role: {} for role in GroundingRole}
                for char, role, value in data.source.grounding_labels(other, caption):
                    said[role][char] = value
                for char, cell in said[GroundingRole.NAMED].items():
                    before, word = caption[:char].split()[-1], caption[char:].split()[0]
                    assert (things[cell].colour, things[cell].shape) == (before, word)
                for char, is_true in said[GroundingRole.HOLDS].items():
                    axis, sign = directions.get(caption[char:].split()[0], (0, 1))
                    subject, other_thing = said[GroundingRole.SUBJECT][char], said[GroundingRole.OBJECT][char]
                    apart = np.subtract(divmod(subject, 3), divmod(other_thing, 3))[axis]
                    assert (apart * sign > 0) == bool(is_true), caption
                    num_said[bool(is_true)] += 1
                    assert is_true or other != number
    assert min(num_said.values()) > 300


def test_nothing_is_said_of_what_is_not_in_the_picture():
    source = scenes("dev", 0, num_groups=1).source
    thing, other = source.scenes[0].things[:2]

    for caption in ("a mauve circle left of a cube", "left", "", "a red star is above"):
        assert all(claim.role == GroundingRole.NAMED for claim in source.grounding_labels(0, caption))
    absent = next(colour for colour in COLOURS if colour not in {each.colour for each in source.scenes[0].things})
    claims = source.grounding_labels(0, f"a {thing.colour} {thing.shape} left of an {absent} {other.shape}")
    assert [claim.role for claim in claims] == [GroundingRole.NAMED]


def test_a_caption_is_read_beside_a_picture_of_which_it_says_something_false():
    data = scenes("dev", 0, num_groups=6)
    captions, reader = claim_reader(data, 37)
    first = np.flatnonzero(np.append(True, captions.images[1:] != captions.images[:-1]))  # one of each image, in groups

    claims = reader(first, captions.images[first])

    num = len(first)
    is_truth = claims.rows[:, 2] == GroundingRole.HOLDS
    own, beside = claims.rows[is_truth & (claims.rows[:, 0] < num)], claims.rows[is_truth & (claims.rows[:, 0] >= num)]
    assert own[:, 3].all()
    bases = 4 * np.arange(6)  # whose confuser by place stands right after them
    speaks = np.isin(bases, own[:, 0])
    assert speaks.any()
    assert np.isin(bases[speaks] + num, beside[beside[:, 3] == 0, 0]).all()
    assert ((claims.beside - np.arange(num)) % num <= 3).all()


def test_claims_are_places_of_pieces_and_leave_out_what_is_cut_off():
    data = scenes("dev", 0, num_groups=2)
    captions, reader = claim_reader(data, 37)
    numbers = np.array([7, 3])

    rows = reader(numbers, captions.images[numbers]).rows

    for pair, number in enumerate(numbers):
        text = canonical_caption(captions.texts[number])
        expected = [
            (text[:char].count(" ") + 1, role, value)  # behind [CLS]; these captions have a piece a word
            for char, role, value in data.source.grounding_labels(captions.images[number], text)
        ]
        assert [tuple(each) for each in rows[rows[:, 0] == pair][:, 1:]] == expected
    cut = claim_reader(data, 6)[1](numbers, captions.images[numbers]).rows
    assert len(cut) < len(rows)
    assert cut[:, 1].max(initial=0) <= 6


def claim_reader(data, max_caption_pieces):
    words = caption_tokenizer(caption for image in data.images for caption in image.captions)
    base = next(iter(VARIANTS.values()))
    config = replace(
        base,
        preprocess=replace(base.preprocess, max_caption_pieces=max_caption_pieces),
        joint=replace(base.joint, vocab_size=words.get_vocab_size(), sep_id=words.token_to_id("[SEP]")),
    )
    tokenizer = Tokenizer(words.to_str(), config)
    captions = read_captions(data, tokenizer, np.arange(len(data.images)))
    return captions, ClaimReader(data.source, captions, tokenizer)


def test_the_loss_of_regions_is_the_sum_over_labels_of_the_mean_cross_entropy():
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
