"""The captions, images and pairs of a batch, and the learning rate: functions of seed, phase and step alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edje.recipe import Phase, RecipeError
from edje.training.batches.negatives import MISSING, Positives, sample_columns
from edje.training.batches.plan import CaptionOrder, plan_batch
from edje.training.schedule import learning_rate, parameter_groups, part_of

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(
    num_captions=st.integers(1, 60),
    per_device=st.integers(1, 5),
    num_devices=st.integers(1, 3),
    seed=seeds,
    epoch=st.integers(0, 3),
)
def test_an_epoch_contains_every_caption_once_on_one_device(num_captions, per_device, num_devices, seed, epoch):
    batch = per_device * num_devices
    if num_captions < batch:
        with pytest.raises(ValueError, match="do not fill a step"):
            CaptionOrder(num_captions, batch, seed)
        return
    order = CaptionOrder(num_captions, batch, seed)
    first = epoch * order.steps_per_epoch

    batches = [order.batch(first + step) for step in range(order.steps_per_epoch)]

    shown = np.concatenate(batches)
    assert all(len(each) == batch for each in batches)
    assert len(set(shown.tolist())) == len(shown)
    assert num_captions - len(shown) < batch  # what does not fill a batch waits for another epoch
    assert set(shown.tolist()) <= set(range(num_captions))


def test_each_epoch_has_another_order():
    order = CaptionOrder(100, 50, seed=3)

    orders = [np.concatenate([order.batch(2 * epoch), order.batch(2 * epoch + 1)]).tolist() for epoch in range(2)]

    assert orders[0] != orders[1]
    assert orders[0] != list(range(100))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_captions=st.integers(12, 60), step=st.integers(0, 20), parts=st.sampled_from([2, 3, 4, 6, 12]))
def test_a_step_in_several_batches_has_the_captions_of_one_batch(seed, num_captions, step, parts):
    whole = CaptionOrder(num_captions, 12, seed)
    divided = CaptionOrder(num_captions, 12, seed, batches_per_step=parts)

    found = [divided.batch(step * parts + part) for part in range(parts)]

    assert divided.steps_per_epoch == whole.steps_per_epoch
    assert np.concatenate(found).tolist() == whole.batch(step).tolist()


@settings(max_examples=40, deadline=None)
@given(seed=seeds, num_groups=st.integers(1, 6), epoch=st.integers(0, 2))
def test_groups_are_adjacent_with_one_caption_of_each_image(seed, num_groups, epoch):
    images = np.arange(3 * num_groups).repeat(2)  # groups of three images with two captions each
    groups = images // 3
    order = CaptionOrder(len(images), 3, seed, images, groups)

    batches = [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]

    assert sorted(np.concatenate(batches).tolist()) == list(range(len(images)))
    for batch in batches:
        assert len(set(groups[batch].tolist())) == 1
        assert len(set(images[batch].tolist())) == 3


def test_a_batch_does_not_depend_on_the_batches_before():
    one, other = CaptionOrder(20, 5, 0), CaptionOrder(20, 5, 0)

    forward = [one.batch(step).tolist() for step in range(12)]
    backward = [other.batch(step).tolist() for step in reversed(range(12))]

    assert forward == backward[::-1]


@st.composite
def steps(draw):
    """A global batch, and a sampler for any caption and image."""
    num_images = draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(seeds))
    images = rng.integers(0, num_images, draw(st.integers(6, 20)))
    num_devices, num_negatives = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 3))
    batch = rng.permutation(len(images))[: num_devices * draw(st.integers(1, 2))]
    found_images = rng.integers(MISSING, num_images, (len(images), 4))
    found_captions = rng.integers(MISSING, len(images), (num_images, 4))

    def sample(captions, images_of_them, rng):
        return draw_some(found_images[captions], rng), draw_some(found_captions[images_of_them], rng)

    def draw_some(lists, rng):
        return sample_columns(lists, num_negatives, rng)

    return images, batch, num_devices, num_negatives, sample if num_negatives else None


def planned(step, rank, num_devices, seed=0):
    images, batch, _, _, sampler = step
    positives = Positives(np.arange(len(images)), images)
    return plan_batch(batch, images, positives, rank, num_devices, sampler, np.random.default_rng(seed))


def named_pairs(plan):
    """The blocks of a plan as pairs of caption and image indices, MISSING for a pair that does not exist."""

    def name(names, places):
        return [MISSING if place == MISSING else int(names[place]) for place in places.tolist()]

    pairs = list(zip(name(plan.captions, plan.pair_caption), name(plan.images, plan.pair_image), strict=True))
    num = len(plan.sample_caption)
    middle = num + num * plan.num_negatives
    return pairs[:num], pairs[num:middle], pairs[middle:]


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_pairs_are_positives_then_images_for_each_caption_then_captions_for_each_image(step):
    images, batch, _, num_negatives, sampler = step

    plan = planned(step, 0, 1)

    own, with_images, with_captions = named_pairs(plan)
    assert own == [(int(caption), int(images[caption])) for caption in batch]
    found = sampler(batch, images[batch], np.random.default_rng(0)) if sampler else np.empty((2, len(batch), 0), int)
    for row, caption in enumerate(batch.tolist()):
        for column in range(num_negatives):
            image, other = int(found[0][row, column]), int(found[1][row, column])
            at = row * num_negatives + column
            assert with_images[at] == ((MISSING, MISSING) if image == MISSING else (caption, image))
            assert with_captions[at] == ((MISSING, MISSING) if other == MISSING else (other, int(images[caption])))


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_a_plan_lists_each_needed_index_once(step):
    plan = planned(step, 0, 1)

    for names, places in (
        (plan.captions, np.concatenate((plan.sample_caption, plan.pair_caption))),
        (plan.images, np.concatenate((plan.sample_image, plan.pair_image))),
    ):
        assert names.tolist() == sorted(set(names.tolist()))
        assert set(places.tolist()) - {MISSING} <= set(range(len(names)))
    assert (plan.pair_caption == MISSING).tolist() == (plan.pair_image == MISSING).tolist()
    assert plan.image_is_positive.diagonal().all()
    assert plan.caption_is_positive.diagonal().all()


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_each_device_gets_its_rows_of_the_positives_of_the_global_batch(step):
    num_devices = step[2]

    whole = planned(step, 0, 1)
    shares = [planned(step, rank, num_devices) for rank in range(num_devices)]

    assert np.array_equal(np.concatenate([share.image_is_positive for share in shares]), whole.image_is_positive)
    assert np.array_equal(np.concatenate([share.caption_is_positive for share in shares]), whole.caption_is_positive)
    assert np.array_equal(whole.caption_is_positive, whole.image_is_positive.T)
    for share in shares:
        rows = np.arange(len(share.sample_caption))
        assert share.image_is_positive[rows, share.sample_offset + rows].all()


@settings(max_examples=40, deadline=None)
@given(step=steps())
def test_all_devices_together_have_the_pairs_of_one(step):
    num_devices = step[2]

    whole = named_pairs(planned(step, 0, 1))
    shares = [named_pairs(planned(step, rank, num_devices)) for rank in range(num_devices)]

    for block in range(3):
        assert [pair for share in shares for pair in share[block]] == whole[block]


def phase(**values):
    fixed = {"name": "p", "epochs": 1.0, "batch_size": 8, "learning_rate": 1e-3, "train": {"adapter": 1.0}}
    return Phase(**(fixed | {"losses": {"itm": 1.0}} | values))


def test_the_rate_rises_evenly_over_the_warm_up():
    rates = [learning_rate(phase(warmup_steps=4, start_learning_rate=2e-4), step, 10, 100) for step in range(4)]

    assert rates == pytest.approx([4e-4, 6e-4, 8e-4, 1e-3])


def test_the_rate_then_decays_by_a_factor_each_epoch():
    rates = [learning_rate(phase(warmup_steps=1), step, 10, 100) for step in (1, 9, 10, 19, 20, 99)]

    assert rates == pytest.approx([1e-3, 1e-3, 0.9e-3, 0.9e-3, 0.81e-3, 1e-3 * 0.9**9])


def test_a_cosine_decay_ends_at_zero():
    wanted = phase(warmup_steps=10, decay="cosine")

    rates = [learning_rate(wanted, step, 10, 110) for step in (10, 35, 60, 109)]

    last = 0.5 * (1 + math.cos(math.pi * 99 / 100))
    assert rates == pytest.approx([1e-3, 1e-3 * (0.5 + math.sqrt(0.125)), 0.5e-3, 1e-3 * last])


class Parts(nn.Module):
    """A parameter of each kind under the names that a training module has."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.adapter = nn.Linear(2, 3)
        self.model.joint = nn.Module()
        self.model.joint.words = nn.Embedding(4, 2)
        self.model.joint.norm = nn.LayerNorm(2)
        self.model.joint.visual_norm = nn.LayerNorm(2)
        self.model.joint.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.heads = nn.Linear(2, 2)
        self.first_stage = nn.Module()
        self.first_stage.word_weights = nn.Parameter(torch.ones(4))
        self.first_stage.log_scale = nn.Parameter(torch.ones(()))


def test_only_matrices_have_weight_decay():
    module = Parts()
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    groups = parameter_groups(module, phase(train={"text": 0.5, "meeting": 1.0}, weight_decay=0.1))

    told = {
        (names[id(parameter)], group["weight_decay"], group["factor"])
        for group in groups
        for parameter in group["params"]
    }
    assert told == {
        ("model.joint.words.weight", 0.1, 0.5),
        ("model.joint.norm.weight", 0.0, 0.5),
        ("model.joint.norm.bias", 0.0, 0.5),
        ("model.joint.layers.0.weight", 0.1, 1.0),
        ("model.joint.layers.0.bias", 0.0, 1.0),
        ("heads.weight", 0.1, 1.0),
        ("heads.bias", 0.0, 1.0),
    }
    assert {name for name, each in module.named_parameters() if each.requires_grad} == {name for name, _, _ in told}


def test_word_weights_are_never_trained():
    groups = parameter_groups(Parts(), phase(train={"first_stage": 1.0}, losses={"first_stage": 1.0}))

    assert [parameter.ndim for group in groups for parameter in group["params"]] == [0]


def test_a_phase_without_trained_parameters_is_refused():
    module = Parts()
    del module.model.joint.visual_norm

    with pytest.raises(RecipeError, match="'p' trains visual, but this model has none of these parts"):
        parameter_groups(module, phase(train={"visual": 1.0}))


def test_a_parameter_of_no_part_is_a_mistake():
    with pytest.raises(ValueError, match=r"model\.oracle\.weight belongs to no part"):
        part_of("model.oracle.weight")
