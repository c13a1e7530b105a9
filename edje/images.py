"""Decodes image files to the input pixels of a vision tower, and to thumbnails.

Knows file formats and their dangers; knows neither the source of the bytes, nor torch, nor normalisation (the engine
subtracts the mean).

Images are resized to a square without cropping, with antialiased bilinear filtering, as SigLIP 2's published
preprocessing does (its `resample` is 2). SigLIP 1 and CLIP used bicubic filtering. CLIP's published preprocessing also
crops the centre; here every image is resized whole, because captions may describe its edges.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageCms, ImageFile, UnidentifiedImageError

from edje.image_repair import MAX_MISSING, repair

#: Pillow's other formats (EPS through Ghostscript, FITS, ICNS, ...) are never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: The formats that need the extra `heic`.
EXTRA_FORMATS = ("HEIC",)
#: Name suffixes of these formats.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".avif", ".avifs", ".heic", ".heif", ".hif"}
)

#: The longest side that the formats other than PNG, BMP and TIFF can express. The resampling filter needs memory in
#: proportion to the longer side (640 MB for 40,000,000 x 1), whatever the number of pixels.
MAX_SIDE = 65_535

#: Limit on the reads of a parser, which protects against files of millions of tiny chunks. An ordinary PNG of 20 MB
#: needs about 10,000 reads (four for each chunk of 8 KiB).
_MIN_READS = 10_000
_BYTES_PER_READ = 1_000

#: A JPEG is decoded at a half, quarter or eighth of its size if that is at least this many times the target. A
#: photograph of 12 megapixels then takes 29 ms instead of 84, and its 384 x 384 pixels differ by 0.1 of 255 on average
#: and by 2 at most.
_DRAFT_MARGIN = 2

#: Limits of a thumbnail in a list of search results; a usual thumbnail has half of these bytes.
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 256, 12_000
_THUMBNAIL_QUALITIES = (80, 65, 50, 35, 20)

Resample = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_PILLOW_MODULES = r"PIL\."
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)  # an entry of `warnings.filters`

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

#: Beyond it the difference of two samples could overflow.
_LARGEST_SAMPLE = 1e30
#: A JPEG decoder fills missing blocks with this value; one less in inverted CMYK.
_MID_GREY = (127, 128)

_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
#: Signatures of images in formats that are not decoded: (offset, signature, name).
_REFUSED_FORMATS = (
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG"),
)

# One thread for each image: several images are decoded at a time, and each thread of the decoder takes memory.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


class ImageError(ValueError):
    """The bytes cannot be decoded, now or later.

    `code` is one of `image_too_large` (bytes), `image_too_many_pixels`, `image_too_complex`, `image_truncated`,
    `image_broken`, `image_format_refused` and `not_an_image`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Limits that are checked before any pixel is decoded; decoding takes `max_pixels` x 4 bytes of memory."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The first frame of an image: 8 bits per channel, not yet upright, perhaps reduced in size."""

    _pixels: Image.Image  # L, RGB, RGBA or CMYK
    _profile: bytes | None
    _transpose: Image.Transpose | None

    def square(self, size: int, resample: Resample = "bilinear") -> NDArray[np.uint8]:
        """Upright RGB pixels `(3, size, size)`, transparent areas white."""
        square = self._finished(self._pixels.resize((size, size), _FILTERS[resample]))
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def thumbnail(self, max_side: int = THUMBNAIL_SIDE, max_bytes: int = THUMBNAIL_BYTES) -> bytes:
        """A WebP image without metadata, with the proportions of the original.

        Quality and then size are reduced until it has at most `max_bytes`; images smaller than `max_side` are not
        enlarged.
        """
        width, height = self._pixels.size
        scale = min(1.0, max_side / max(width, height))
        while True:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            small = self._finished(self._pixels.resize(size, Image.Resampling.BICUBIC))
            for quality in _THUMBNAIL_QUALITIES:
                file = io.BytesIO()
                small.save(file, "WEBP", quality=quality)
                if file.tell() <= max_bytes or size == (1, 1):
                    return file.getvalue()
            scale /= 2

    def _finished(self, resized: Image.Image) -> Image.Image:
        """Convert resized pixels to upright RGB. Called after the resize, because fewer pixels take less time."""
        image = _in_srgb(resized, self._profile)
        if image.mode == "RGBA":
            # White, because most images with transparency (logos, products) are made for white paper.
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image = image if self._transpose is None else image.transpose(self._transpose)
        image.info = {}  # metadata that Pillow would write into the thumbnail
        return image


def decode_image(data: bytes, size: int, limits: ImageLimits, resample: Resample = "bilinear") -> NDArray[np.uint8]:
    """The first frame as upright RGB pixels `(3, size, size)`. Raises `ImageError`."""
    return open_image(data, limits, min_side=size).square(size, resample)


def make_thumbnail(data: bytes, limits: ImageLimits) -> bytes:
    """A WebP thumbnail of the first frame; see `DecodedImage.thumbnail`. Raises `ImageError`."""
    return open_image(data, limits, min_side=THUMBNAIL_SIDE).thumbnail()


def open_image(data: bytes, limits: ImageLimits, *, min_side: int) -> DecodedImage:
    """Decode the first frame; a JPEG perhaps at a reduced size, but large enough for results of `min_side` pixels.

    Raises `ImageError`.
    """
    if not data:
        raise ImageError("not_an_image", "the image is empty")
    if len(data) > limits.max_bytes:
        raise ImageError("image_too_large", f"the image has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    _silence_pillow()
    try:
        return _decoded(data, limits, _DRAFT_MARGIN * min_side)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_many_pixels", "the header announces more pixels than Pillow decodes") from error
    except Exception as error:
        # Decoders raise errors without a common base class on invalid bytes: OSError, SyntaxError, struct.error,
        # zlib.error, KeyError, MemoryError from an absurd length field, ...
        is_truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        code = "image_truncated" if is_truncated else "image_broken"
        raise ImageError(code, f"the image cannot be decoded: {type(error).__name__}: {str(error)[:200]}") from error


def _decoded(data: bytes, limits: ImageLimits, draft_side: int) -> DecodedImage:
    repaired = repair(data, limits.max_pixels)
    formats = _formats_of(data)
    with Image.open(_CountedReads(repaired.data), formats=formats) as image:
        width, height = image.size
        if width * height > limits.max_pixels or max(width, height) > MAX_SIDE:
            raise ImageError(
                "image_too_many_pixels",
                f"the image has {width} x {height} pixels; at most {limits.max_pixels} are allowed, and {MAX_SIDE} "
                "to a side",
            )
        image.draft(None, (draft_side, draft_side))
        image.load()
        if repaired.ends_early and _missing_share(image) > MAX_MISSING:
            raise ImageError("image_truncated", "the image file ends too early: a part of the pixels is missing")
        profile = image.info.get("icc_profile")
        return DecodedImage(_eight_bit(image), profile, _transpose_of(image))


def _formats_of(data: bytes) -> tuple[str, ...]:
    """The formats to try. Raises `ImageError` for HEIC where the package that decodes it is missing."""
    brands = _brands_of(data)
    if brands & _AVIF_BRANDS or not brands & _HEIC_BRANDS:
        return FORMATS
    if not _has_heic():
        raise ImageError(
            "image_format_refused",
            "the image is HEIC, which needs the package pillow-heif: install the extra 'heic' "
            "(pip install 'edje-rerank[heic]'), or convert the image",
        )
    return ("HEIF",)


def _brands_of(data: bytes) -> set[bytes]:
    """The brands in the first box of an ISO media file; none for any other file."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 1024)
    return {data[8:12], *(data[start : start + 4] for start in range(16, end, 4))}


@cache
def _has_heic() -> bool:
    """Whether HEIC can be decoded; registers the format with Pillow."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return True


def _missing_share(image: Image.Image) -> float:
    """Share of the rows at the bottom that the decoder filled with mid-grey, because their data is missing."""
    samples = np.asarray(image)
    is_grey: NDArray[np.bool_] = np.isin(samples, _MID_GREY).reshape(len(samples), -1)
    rows: NDArray[np.bool_] = np.all(is_grey, axis=1)
    num_missing = next((number for number, is_filled in enumerate(rows[::-1]) if not is_filled), len(rows))
    return num_missing / len(rows)


def _eight_bit(image: ImageFile.ImageFile) -> Image.Image:
    """The loaded image as L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I;16"):
        return _scaled_sixteen_bit(image)
    if image.mode in ("I", "F"):
        samples = np.nan_to_num(np.asarray(image).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        samples = samples.clip(-_LARGEST_SAMPLE, _LARGEST_SAMPLE)
        return Image.fromarray(_scaled(samples, *_range_of(samples)))
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # the fourth byte of many writers is padding
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scaled_sixteen_bit(image: ImageFile.ImageFile) -> Image.Image:
    samples = np.asarray(image).astype(np.float32)
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    grey = Image.fromarray(_scaled(samples, 0.0, float(2**bits - 1)))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def _range_of(samples: NDArray[np.float32]) -> tuple[float, float]:
    """The values of black and white: the smallest usual range that holds all samples, else their extremes."""
    low, high = float(samples.min()), float(samples.max())
    for white in (1.0, 255.0, 65_535.0):
        if low >= 0.0 and high <= white:
            return 0.0, white
    return low, max(high, low + 1.0)


def _scaled(samples: NDArray[np.float32], black: float, white: float) -> NDArray[np.uint8]:
    shades: NDArray[np.float32] = np.rint((samples - black) * (255.0 / (white - black)))
    return shades.clip(0.0, 255.0).astype(np.uint8)


def _transpose_of(image: ImageFile.ImageFile) -> Image.Transpose | None:
    """The transposition that turns the loaded image upright. Pillow turns TIFF itself and removes the tag."""
    try:
        return _ORIENTATIONS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        # Invalid metadata (any error, see `open_image`) does not change the pixels.
        return None


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image converted from its colour profile to sRGB, as viewers do; unchanged if the profile is invalid."""
    if not profile:
        return image
    colours = image.convert("RGB") if image.mode == "RGBA" else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (source.profile.profile_description or "").lower():
            return image
        converted = ImageCms.profileToProfile(
            colours, source, _srgb(), ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except Exception:  # see `open_image`
        return image
    assert converted is not None  # without `inPlace`
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _unidentified(data: bytes) -> ImageError:
    if _brands_of(data):
        return ImageError("image_broken", "the image is AVIF or HEIC, and its header cannot be read")
    for offset, signature, name in _REFUSED_FORMATS:
        if data.startswith(signature, offset):
            return ImageError(
                "image_format_refused", f"the image is {name}; it must be one of {', '.join(FORMATS + EXTRA_FORMATS)}"
            )
    return ImageError(
        "not_an_image",
        f"the {len(data)} bytes are not an image in any of the formats {', '.join(FORMATS + EXTRA_FORMATS)}",
    )


class _CountedReads(io.BytesIO):
    """A BytesIO that limits the number of reads, so that a file of tiny chunks cannot occupy a thread for minutes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads_left = _MIN_READS + len(data) // _BYTES_PER_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads_left -= 1
        if self._reads_left < 0:
            raise ImageError("image_too_complex", "the image is made of too many tiny chunks")
        return super().read(size)


def _silence_pillow() -> None:
    """Suppress Pillow's warnings about unusual files: they would go to stderr, or be raised where warnings are errors.

    A filter rather than `catch_warnings`, which replaces the filters of the whole process and so cannot be used in
    several threads at once.
    """
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)
