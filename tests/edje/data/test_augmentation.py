"""Augmented views are deterministic crops and mirror images."""

from __future__ import annotations

import numpy as np
import pytest

from edje.data.augmentation import view_of
from edje.data.dataset import CaptionedImage, Dataset, Problems
from edje.images import ImageError

SIZE = 24


class Gradients:
    """Red grows to the right, green to the bottom, blue is the image's number."""

    def pixels(self, index, size, resample):
        if index == 7:
            raise ImageError("image_broken", "cut off")
        ramp = np.linspace(0, 250, size).astype(np.uint8)
        across, down = np.broadcast_to(ramp, (size, size)), np.broadcast_to(ramp[:, None], (size, size))
        return np.stack([across, down, np.full((size, size), index, np.uint8)])


@pytest.fixture
def dataset():
    images = tuple(CaptionedImage(f"img-{number}", ("a caption",)) for number in range(8))
    return Dataset("gradients", images, Problems(), "0123", Gradients())


def pixels(dataset, view, index, **options):
    return view_of(dataset, view, **options).pixels(index, SIZE)


def is_mirrored(picture):
    return picture[0, 0, 0] > picture[0, 0, -1]


def test_view_0_is_the_image(dataset):
    assert view_of(dataset, 0) is dataset


def test_view_1_is_the_mirror_image(dataset):
    np.testing.assert_array_equal(pixels(dataset, 1, 3), dataset.pixels(3, SIZE)[:, :, ::-1])


@pytest.mark.parametrize("view", [1, 2, 5])
def test_a_view_is_always_the_same(dataset, view):
    np.testing.assert_array_equal(pixels(dataset, view, 2), pixels(dataset, view, 2))
    assert view_of(dataset, view).fingerprint == view_of(dataset, view).fingerprint


def test_other_views_are_upright_crops_of_half_to_nearly_all_of_the_image_some_mirrored(dataset):
    crops = [pixels(dataset, view, index) for view in range(2, 22) for index in range(7)]

    assert all(crop.shape == (3, SIZE, SIZE) and crop.dtype == np.uint8 for crop in crops)
    assert all(crop.flags.c_contiguous for crop in crops)
    for crop in crops:
        across, down = (float(np.ptp(crop[channel].astype(int))) / 250 for channel in (0, 1))
        assert 0.4 <= across * down <= 1.0
        assert 1 / 1.4 <= across / down <= 1.4
        assert crop[1, 0, 0] < crop[1, -1, 0]  # never upside down
    assert 0.3 <= np.mean([is_mirrored(crop) for crop in crops]) <= 0.7
    assert {int(crop[2, 0, 0]) for crop in crops} == set(range(7))


@pytest.mark.parametrize("view", [1, 2, 3, 4])
def test_no_view_is_mirrored_where_captions_distinguish_left_and_right(dataset, view):
    crops = [pixels(dataset, view, index, may_mirror=False) for index in range(7)]

    assert not any(is_mirrored(crop) for crop in crops)
    assert all((crop != dataset.pixels(index, SIZE)).any() for index, crop in enumerate(crops))


def test_each_view_has_its_fingerprint(dataset):
    views = [view_of(dataset, view, may_mirror=mirror) for view in range(4) for mirror in (True, False)]

    assert len({view.fingerprint for view in views}) == 7  # view 0 is the same in both
    assert all(view.images == dataset.images for view in views)


def test_a_view_of_an_image_that_cannot_be_decoded_raises(dataset):
    with pytest.raises(ImageError, match="cut off"):
        pixels(dataset, 2, 7)
