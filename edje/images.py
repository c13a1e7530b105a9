"""Turns the bytes of an image file into the pixels a vision tower takes.

Knows file formats and their dangers; knows nothing of where the bytes come from, of torch, or of normalisation
(the engine subtracts the mean).

The picture is squeezed to a square without cropping, with antialiased bilinear filtering: what SigLIP 2's published
preprocessing does (its `resample` is 2), so that the tower sees what it was trained on. SigLIP 1 and CLIP used bicubic
filtering. CLIP's own preprocessing crops the middle of the picture besides; here it is squeezed all the same, because
what a caption speaks of may stand at the edge.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

#: Everything else Pillow could open (EPS through Ghostscript, FITS, ICNS, ...) is never handed to its parser.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

#: The longest side that any of the formats but PNG, BMP and TIFF can express. The resampling filter of a longer side
#: needs memory in proportion to the side (640 MB for 40,000,000 x 1), whatever the number of pixels.
MAX_SIDE = 65_535

#: A parser that asks for more reads than this is being led through millions of tiny chunks. An ordinary PNG of 20 MB
#: needs about 10,000 (four for each chunk of 8 KiB).
_MIN_READS = 10_000
_BYTES_PER_READ = 1_000

#: A JPEG is decoded at a half, quarter or eighth if that is still this many times the target. A photograph of
#: 12 megapixels then takes 29 ms instead of 84, and its 384 x 384 pixels differ by 0.1 of 255 on average, 2 at most.
_DRAFT_MARGIN = 2

Resample = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_PILLOW_MODULES = r"PIL\."
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)  # as `warnings.filters` holds it

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Beyond it a difference of two samples could overflow.
_LARGEST_SAMPLE = 1e30

#: What people send that is a picture, yet none of the formats above: (offset, signature, name).
_REFUSED_FORMATS = (
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyp", "HEIF"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG"),
)


class ImageError(ValueError):
    """These bytes cannot become pixels, now or later.

    `code` is one of `image_too_large` (bytes), `image_too_many_pixels`, `image_too_complex`, `image_truncated`,
    `image_broken`, `image_format_refused` and `not_an_image`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is refused before a single pixel is decoded; `max_pixels` x 4 bytes is the memory of one decoding."""

    max_bytes: int
    max_pixels: int


def decode_image(data: bytes, size: int, limits: ImageLimits, resample: Resample = "bilinear") -> NDArray[np.uint8]:
    """The first frame as `(3, size, size)` RGB, upright by its EXIF orientation; raises `ImageError`."""
    if not data:
        raise ImageError("not_an_image", "the image is empty")
    if len(data) > limits.max_bytes:
        raise ImageError("image_too_large", f"the image has {len(data)} bytes; at most {limits.max_bytes} are taken")
    _silence_pillow()
    try:
        return _decode(data, size, limits, _FILTERS[resample])
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_many_pixels", "the header announces more pixels than Pillow will decode") from error
    except Exception as error:
        # What a parser raises on hostile bytes has no common root (OSError, SyntaxError, struct.error, zlib.error,
        # KeyError, MemoryError from an absurd length field, ...), and all of it is the file's fault.
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        code = "image_truncated" if truncated else "image_broken"
        raise ImageError(code, f"the image cannot be decoded: {type(error).__name__}: {str(error)[:200]}") from error


def _decode(data: bytes, size: int, limits: ImageLimits, resample: Image.Resampling) -> NDArray[np.uint8]:
    with Image.open(_CountedReads(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > limits.max_pixels or max(width, height) > MAX_SIDE:
            raise ImageError(
                "image_too_many_pixels",
                f"the image has {width} x {height} pixels; at most {limits.max_pixels} are taken, {MAX_SIDE} to a side",
            )
        image.draft(None, (_DRAFT_MARGIN * size, _DRAFT_MARGIN * size))
        image.load()
        square = _eight_bit(image).resize((size, size), resample)
        if square.mode == "RGBA":
            # White, because that is the paper most cut-out pictures (logos, products) were drawn for. After the
            # resize, which weighs colours by alpha: the full-size picture is not copied once more.
            paper = Image.new("RGBA", square.size, "white")
            square = Image.alpha_composite(paper, square)
        square = square.convert("RGB")
        turn = _turn(image)
        if turn is not None:
            # Turning the square gives the same as turning first, and moves 400 kB instead of the whole picture.
            square = square.transpose(turn)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _eight_bit(image: ImageFile.ImageFile) -> Image.Image:
    """The loaded picture as L, RGB or RGBA."""
    if image.mode.startswith("I;16"):
        samples = np.asarray(image).astype(np.float32)
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        return Image.fromarray(_scaled(samples, 0.0, float(2**bits - 1)))
    if image.mode in ("I", "F"):
        samples = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        samples = samples.clip(-_LARGEST_SAMPLE, _LARGEST_SAMPLE)
        return Image.fromarray(_scaled(samples, *_range_of(samples)))
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _range_of(samples: NDArray[np.float32]) -> tuple[float, float]:
    """The values that mean black and white: the smallest usual range the samples fit, else their own extremes."""
    low, high = float(samples.min()), float(samples.max())
    for white in (1.0, 255.0, 65_535.0):
        if low >= 0.0 and high <= white:
            return 0.0, white
    return low, max(high, low + 1.0)


def _scaled(samples: NDArray[np.float32], black: float, white: float) -> NDArray[np.uint8]:
    shades: NDArray[np.float32] = np.rint((samples - black) * (255.0 / (white - black)))
    return shades.clip(0.0, 255.0).astype(np.uint8)


def _turn(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """What puts the loaded picture upright. Pillow turns TIFF itself, and drops the mark."""
    try:
        return _ORIENTATIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Broken metadata (any error, see decode_image) does not make the pixels worse.
        return None


def _unidentified(data: bytes) -> ImageError:
    for offset, signature, name in _REFUSED_FORMATS:
        if data.startswith(signature, offset):
            return ImageError("image_format_refused", f"{name} is not among the formats taken: {', '.join(FORMATS)}")
    return ImageError("not_an_image", f"these {len(data)} bytes are no image in any of: {', '.join(FORMATS)}")


class _CountedReads(io.BytesIO):
    """Bytes that lose patience with a parser, so that a file of tiny chunks cannot hold a thread for minutes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads_left = _MIN_READS + len(data) // _BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ImageError("image_too_complex", "the image is made of too many tiny chunks")
        return super().read(size)


def _silence_pillow() -> None:
    """Keep what Pillow says about odd files off stderr: the outcome says it, and warnings may be errors.

    A filter rather than `catch_warnings`, which swaps the filters of the whole process and so cannot be used in
    several threads at once.
    """
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)
