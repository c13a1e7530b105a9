"""Calibration: from a pair's logit and its first-stage score to the log-odds that the image fits the text.

A pure function of one request's numbers, and the constants it needs for each direction of a query. Knows neither the
model nor how the constants were fitted (`edje.training.calibrate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

#: Which of the two is the query. Text-to-image ranks images for a text, image-to-text ranks texts for an image.
Direction = Literal["text-to-image", "image-to-text"]

_CLOSED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class DirectionCalibration:
    """Constants for one direction: log-odds = (logit + first_stage_gain * score) / temperature + offset.

    `score` is the candidate's standardised first-stage score (`edje.first_stage_scores`). With a gain of 0 the model
    ranks without a first stage.
    """

    __pydantic_config__ = _CLOSED

    temperature: Annotated[float, Field(gt=0)]
    offset: float
    first_stage_gain: Annotated[float, Field(ge=0)]

    def summary(self) -> str:
        """The constants in words, for a log line."""
        first_stage = f"first-stage gain {self.first_stage_gain:.3g}" if self.first_stage_gain else "no first stage"
        return f"{first_stage}, temperature {self.temperature:.3g}, offset {self.offset:.3g}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The constants of a model, fitted on pairs that it was not trained on."""

    __pydantic_config__ = _CLOSED

    text_to_image: DirectionCalibration
    image_to_text: DirectionCalibration

    def of(self, direction: Direction) -> DirectionCalibration:
        """The constants for queries of this direction."""
        return self.text_to_image if direction == "text-to-image" else self.image_to_text

    def by_direction(self) -> tuple[tuple[Direction, DirectionCalibration], ...]:
        """Each direction with its constants."""
        return ("text-to-image", self.text_to_image), ("image-to-text", self.image_to_text)


def log_odds(
    logits: NDArray[np.floating], first_stage: NDArray[np.floating], calibration: DirectionCalibration | None
) -> NDArray[np.float64]:
    """The log-odds of pairs, in the shape of their logits; their sigmoid is the probability that image and text fit.

    `first_stage` holds the pairs' standardised scores; it is not read if the gain is 0. Without a calibration the
    logits are returned: they rank the pairs, but their sigmoids are not probabilities.
    """
    exact = logits.astype(np.float64)
    if calibration is None:
        return exact
    if calibration.first_stage_gain:
        exact = exact + calibration.first_stage_gain * first_stage
    return exact / calibration.temperature + calibration.offset


def sigmoid(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), in the form that does not overflow for large negative values."""
    exact = values.astype(np.float64)
    small = np.exp(-np.abs(exact))
    return np.where(exact >= 0, 1.0 / (1.0 + small), small / (1.0 + small))
