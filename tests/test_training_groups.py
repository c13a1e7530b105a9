"""Groups that stand together in a batch, and what stands in each region of a drawn picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.data.dataset import LabelledSource
from edje.data.scenes import scenes
from edje.training.losses import regions_loss
from edje.training.sampling import Epochs


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
