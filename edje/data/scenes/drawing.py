"""Draws the pixels of a scene.

Objects are shifted at random, by so little that every relation still holds.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, radians, sin
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from edje.data.scenes.world import GRID, Scene

RGB: Final = {
    "red": (215, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (240, 215, 0),
    "green": (20, 150, 50),
    "blue": (25, 80, 215),
    "purple": (120, 40, 160),
    "pink": (250, 130, 195),
    "black": (15, 15, 15),
}
#: All lengths are in units of the image's side. Distance of the outer cells' centres from the edge.
_MARGIN: Final = 0.18
_CELL: Final = (1 - 2 * _MARGIN) / (GRID - 1)
_RADIUS: Final = {"large": 0.16, "small": 0.115}
#: The largest shift of an object along each axis: a fourteenth of a cell.
_JITTER: Final = 0.022
_LINE: Final = 0.016  # width of an outline
_RING: Final = 0.024  # width of the outline of a hollow object
_STRIPE: Final = 0.04  # width of a stripe, and of a gap
_DOT: Final = 0.023  # radius
_DOT_STEP: Final = 0.078
_ROTATIONS_DEGREES: Final = (-8, -4, 0, 4, 8)
#: Number of dots or stripes on each side of the middle one: enough for the largest object.
_REPEATS: Final = 3
#: Drawn this many times larger, then averaged for antialiasing.
_SUPERSAMPLING: Final = 4
_NOISE: Final = 4.0  # standard deviation, of 255
#: Corners in units of the radius, scaled so that all shapes look equally large.
_CORNERS: Final = {
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": ((0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)),
    "diamond": ((0.0, -1.2), (0.85, 0.0), (0.0, 1.2), (-0.85, 0.0)),
    "cross": tuple(
        (x * cos(rotation) - y * sin(rotation), x * sin(rotation) + y * cos(rotation))
        for rotation in (0.0, pi / 2, pi, 3 * pi / 2)
        for x, y in ((-0.4, -0.4), (-0.4, -1.05), (0.4, -1.05))
    ),
    "star": tuple(
        (reach * sin(number * pi / 5), -reach * cos(number * pi / 5)) for number, reach in enumerate([1.2, 0.58] * 5)
    ),
}


def draw(scene: Scene, size: int, *key: int) -> NDArray[np.uint8]:
    """The scene as RGB `(3, size, size)`. The key decides the shifts, rotations and tints."""
    rng = np.random.default_rng(key)
    num_things = len(scene.things)
    side = size * _SUPERSAMPLING
    paper = rng.integers(222, 246, 3)
    canvas = Image.new("RGB", (side, side), tuple(paper.tolist()))
    offsets = rng.uniform(-_JITTER, _JITTER, (num_things, 2))
    rotations = rng.integers(len(_ROTATIONS_DEGREES), size=num_things)
    tints = rng.integers(-12, 13, (num_things, 3))
    for thing, offset, rotation, tint in zip(scene.things, offsets, rotations.tolist(), tints, strict=True):
        colour = tuple((np.array(RGB[thing.colour]) + tint).clip(0, 255).tolist())
        body, ink = _stencils(thing.shape, thing.pattern, round(_RADIUS[thing.size] * side), side, rotation)
        x, y = (
            round((_MARGIN + _CELL * cell + shift) * side) - body.width // 2
            for cell, shift in zip((thing.column, thing.row), offset.tolist(), strict=True)
        )
        if thing.pattern != "hollow":
            canvas.paste((255, 255, 255), (x, y), body)
        canvas.paste(colour, (x, y), ink)
    pixels = np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32)
    pixels = pixels + _NOISE * rng.standard_normal(pixels.shape, np.float32)
    return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


@lru_cache(maxsize=4096)
def _stencils(shape: str, pattern: str, radius: int, side: int, rotation: int) -> tuple[Image.Image, Image.Image]:
    """Masks of the area that the object covers, and of the area in its colour."""
    body = _body(shape, radius, radians(_ROTATIONS_DEGREES[rotation]))
    if pattern == "solid":
        return body, body
    inner = _eroded(body, _RING if pattern == "hollow" else _LINE, side)
    if pattern == "hollow":
        return body, ImageChops.subtract(body, inner)
    gaps = _dots(body.width, side) if pattern == "dotted" else _gaps(body.width, side)
    return body, ImageChops.subtract(body, ImageChops.darker(inner, gaps))


def _eroded(body: Image.Image, thickness: float, side: int) -> Image.Image:
    """The minimum over each square neighbourhood, by doubling. The border is black, so wrapping has no effect."""
    reach = round(thickness * side)
    for x, y in ((1, 0), (0, 1)):
        covered = 1
        while covered < 2 * reach + 1:
            step = min(covered, 2 * reach + 1 - covered)
            body = ImageChops.darker(body, ImageChops.offset(body, -x * step, -y * step))
            covered += step
        body = ImageChops.offset(body, x * reach, y * reach)
    return body


def _dots(width: int, side: int) -> Image.Image:
    """Dots in staggered rows, one of them in the middle."""
    dots = Image.new("L", (width, width))
    pen = ImageDraw.Draw(dots)
    step, radius, middle = _DOT_STEP * side, _DOT * side, width / 2
    for row in range(-_REPEATS, _REPEATS + 1):
        for column in range(-_REPEATS, _REPEATS + 1):
            x, y = middle + (column + row % 2 / 2) * step, middle + row * step
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    return dots


def _gaps(width: int, side: int) -> Image.Image:
    """The gaps between horizontal stripes, one of which goes through the middle."""
    gaps = Image.new("L", (width, width))
    pen = ImageDraw.Draw(gaps)
    thickness = _STRIPE * side
    for number in range(-_REPEATS, _REPEATS + 1):
        top = width / 2 + (2 * number + 0.5) * thickness
        pen.rectangle((0, top, width, top + thickness - 1), 255)
    return gaps


def _body(shape: str, radius: int, rotation: float) -> Image.Image:
    """The filled shape, white on black, centred in a square that is large enough for every rotation."""
    middle = round(1.3 * radius)
    body = Image.new("L", (2 * middle + 1, 2 * middle + 1))
    pen = ImageDraw.Draw(body)
    if shape == "circle":
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), 255)
    else:
        corners = [
            (
                middle + radius * (x * cos(rotation) - y * sin(rotation)),
                middle + radius * (x * sin(rotation) + y * cos(rotation)),
            )
            for x, y in _CORNERS[shape]
        ]
        pen.polygon(corners, 255)
    return body
