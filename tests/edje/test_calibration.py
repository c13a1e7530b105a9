"""Calibration: logits and standardised first-stage scores to log-odds, by direction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from edje.calibration import Calibration, DirectionCalibration, log_odds, sigmoid

LOGITS = np.array([2.0, -1.0, 0.0], np.float32)
FIRST_STAGE = np.array([0.0, -1.0, -2.0], np.float32)
logits = st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=20).map(
    lambda sixteenths: np.array(sixteenths, np.float32) / 16
)


def test_log_odds_are_the_weighted_sum_over_the_temperature_plus_the_offset():
    calibration = DirectionCalibration(temperature=2.0, offset=-1.0, first_stage_gain=0.5)

    assert log_odds(LOGITS, FIRST_STAGE, calibration) == pytest.approx([0.0, -1.75, -1.5])


def test_without_a_calibration_the_logits_are_the_log_odds():
    assert log_odds(LOGITS, FIRST_STAGE, None).tolist() == LOGITS.tolist()


@given(logits)
def test_with_a_gain_of_zero_the_first_stage_is_not_read(logits):
    calibration = DirectionCalibration(temperature=3.0, offset=0.25, first_stage_gain=0.0)

    calibrated = log_odds(logits, np.full(len(logits), np.nan, np.float32), calibration)

    assert np.isfinite(calibrated).all()
    assert np.argsort(-calibrated, kind="stable").tolist() == np.argsort(-logits, kind="stable").tolist()


def test_each_direction_has_its_own_constants():
    images, texts = DirectionCalibration(1.0, 0.0, 0.0), DirectionCalibration(2.0, 0.0, 1.0)

    calibration = Calibration(text_to_image=images, image_to_text=texts)

    assert calibration.of("text-to-image") is images
    assert calibration.of("image-to-text") is texts


@pytest.mark.parametrize(
    "constants",
    [
        {"temperature": 0.0, "offset": 0.0, "first_stage_gain": 0.0},
        {"temperature": -1.0, "offset": 0.0, "first_stage_gain": 0.0},
        {"temperature": float("inf"), "offset": 0.0, "first_stage_gain": 0.0},
        {"temperature": 1.0, "offset": float("nan"), "first_stage_gain": 0.0},
        {"temperature": 1.0, "offset": 0.0, "first_stage_gain": -0.1},
        {"temperature": 1.0, "offset": 0.0},
        {"temperature": 1.0, "offset": 0.0, "first_stage_gain": 0.0, "slope": 1.0},
    ],
)
def test_constants_that_give_no_probability_are_refused(constants):
    with pytest.raises(ValidationError):
        TypeAdapter(DirectionCalibration).validate_python(constants)


def test_the_sigmoid_does_not_overflow():
    assert sigmoid(np.array([-1e30, 0.0, 1e30])).tolist() == [0.0, 0.5, 1.0]
    assert sigmoid(np.array([2.6], np.float32)) == pytest.approx([0.9309], abs=1e-4)
