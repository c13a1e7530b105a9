"""Image files become the pixels that viewers show, and no file exhausts memory or time."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from edje import images
from edje.images import FORMATS, SUFFIXES, ImageError, ImageLimits, decode_image, make_thumbnail, open_image

LIMITS = ImageLimits(max_bytes=4_000_000, max_pixels=4_000_000)
SIZE = 32


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def quadrants(size: int = 64) -> Image.Image:
    """Red, green / blue, white: reveals a rotation, a flip or exchanged channels."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half] = (255, 0, 0)
    pixels[:half, half:] = (0, 255, 0)
    pixels[half:, :half] = (0, 0, 255)
    pixels[half:, half:] = (255, 255, 255)
    return Image.fromarray(pixels)


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    quarter, far = SIZE // 4, 3 * SIZE // 4
    return [tuple(int(v) for v in pixels[:, y, x]) for y in (quarter, far) for x in (quarter, far)]


def assert_quadrants(pixels: np.ndarray, tolerance: int = 3) -> None:
    expected = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_allclose(corners(pixels), expected, atol=tolerance)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, SIZE, limits)
    return caught.value


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_each_format_gives_the_same_picture(image_format, options):
    assert_quadrants(decode_image(saved(quadrants(), image_format, **options), SIZE, LIMITS), tolerance=8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_a_picture_is_turned_upright(image_format, orientation):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    stored = quadrants() if orientation == 1 else quadrants().transpose(Image.Transpose(back[orientation]))
    if image_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {}
    data = saved(stored, image_format, exif=exif.tobytes(), **options)

    assert_quadrants(decode_image(data, SIZE, LIMITS), tolerance=16)


def test_invalid_exif_does_not_change_the_pixels():
    data = saved(quadrants(), "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")

    assert_quadrants(decode_image(data, SIZE, LIMITS), tolerance=8)


def test_transparency_lies_on_white():
    image = quadrants().convert("RGBA")
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:32, :32] = 0
    alpha[:32, 32:] = 128
    image.putalpha(Image.fromarray(alpha))

    seen = corners(decode_image(saved(image, "PNG"), SIZE, LIMITS))

    np.testing.assert_allclose(seen, [(255, 255, 255), (127, 255, 127), (0, 0, 255), (255, 255, 255)], atol=2)


def test_hidden_colours_do_not_bleed_through_the_edge_of_a_transparent_area():
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 0)  # red, but invisible
    pixels[:, 32:] = (255, 255, 255, 255)

    assert decode_image(saved(Image.fromarray(pixels), "PNG"), 7, LIMITS).min() >= 254


def test_grey_with_alpha_lies_on_white():
    image = Image.new("LA", (64, 64), (0, 255))
    image.paste((0, 0), (0, 0, 32, 64))

    seen = corners(decode_image(saved(image, "PNG"), SIZE, LIMITS))

    assert seen == [(255,) * 3, (0,) * 3, (255,) * 3, (0,) * 3]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\xff"])
@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour_lies_on_white(image_format, transparency):
    if image_format == "GIF" and isinstance(transparency, bytes):
        transparency = 0
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 10, 10, 255, 0, 0, 0, 255, 0])
    image.paste(1, (32, 0, 64, 64))

    seen = corners(decode_image(saved(image, image_format, transparency=transparency), SIZE, LIMITS))

    assert seen == [(255, 255, 255), (255, 0, 0), (255, 255, 255), (255, 0, 0)]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "WEBP"])
def test_greyscale_becomes_three_equal_channels(image_format):
    grey = Image.new("L", (40, 30), 100)

    pixels = decode_image(saved(grey, image_format), SIZE, LIMITS)

    assert np.abs(pixels.astype(int) - 100).max() <= 2


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP"])
def test_one_bit_black_and_white(image_format):
    image = Image.new("1", (64, 64), 0)
    image.paste(1, (32, 0, 64, 64))

    assert corners(decode_image(saved(image, image_format), SIZE, LIMITS)) == [(0,) * 3, (255,) * 3] * 2


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(image_format):
    ramp = np.repeat(np.linspace(0, 65_535, 256).astype(np.uint16)[None, :], 256, axis=0)

    pixels = decode_image(saved(Image.fromarray(ramp), image_format), 256, LIMITS)

    np.testing.assert_allclose(pixels[0, 100], np.arange(256), atol=1)


def test_sixteen_bit_colour_is_scaled_and_not_clipped():
    row = b"\x00" + struct.pack(">HHH", 65_535, 32_768, 0) * 8
    data = png(8, 8, png_chunk(b"IDAT", zlib.compress(row * 8)), bits=16)

    np.testing.assert_allclose(decode_image(data, SIZE, LIMITS)[:, 5, 5], [255, 128, 0], atol=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.5, 1.0), (0, 128, 255)),
        ((0.0, 100.0, 200.0), (0, 100, 200)),
        ((0.0, 32_767.5, 65_535.0), (0, 128, 255)),
        ((-10.0, 0.0, 10.0), (0, 128, 255)),
        ((-3e38, 0.0, 3e38), (0, 128, 255)),
        ((np.nan, np.inf, 1.0), (0, 0, 255)),
        ((1e6, 1e6, 1e6), (0, 0, 0)),
    ],
)
def test_a_float_tiff_is_scaled_from_the_smallest_usual_range_it_fits(values, expected):
    stripes = np.repeat(np.repeat(np.array(values, np.float32), 8)[None, :], 24, axis=0)

    pixels = decode_image(saved(Image.fromarray(stripes), "TIFF"), 24, LIMITS)

    np.testing.assert_allclose(pixels[0, 12, [4, 12, 20]], expected, atol=1)


def test_cmyk_of_either_polarity_is_the_same_picture():
    cmyk = quadrants().convert("CMYK")

    assert_quadrants(decode_image(saved(cmyk, "TIFF"), SIZE, LIMITS))
    adobe = saved(cmyk, "JPEG", quality=95, subsampling=0)
    assert b"Adobe" in adobe  # Pillow writes the inverted samples that Photoshop does
    assert_quadrants(decode_image(adobe, SIZE, LIMITS), tolerance=12)


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_of_several_frames_is_decoded(image_format):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(frames[0], image_format, save_all=True, append_images=frames[1:], **options)

    np.testing.assert_allclose(corners(decode_image(data, SIZE, LIMITS)), [(255, 0, 0)] * 4, atol=2)


def test_a_phones_multi_picture_jpeg_is_a_jpeg():
    data = saved(quadrants(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))], quality=95)

    assert_quadrants(decode_image(data, SIZE, LIMITS), tolerance=40)


def test_a_long_picture_is_resized_to_a_square_without_cropping():
    assert_quadrants(decode_image(saved(quadrants().resize((300, 50)), "PNG"), SIZE, LIMITS))


def test_bicubic_filtering_is_an_option():
    bars = Image.fromarray(np.tile(np.repeat([64, 192], 2).astype(np.uint8), (32, 8)))

    linear, cubic = (decode_image(saved(bars, "PNG"), 64, LIMITS, resample) for resample in ("bilinear", "bicubic"))

    assert (linear.min(), linear.max()) == (64, 192)
    assert cubic.min() < 64 < 192 < cubic.max()  # it overshoots at an edge


def test_reduced_decoding_of_a_large_jpeg_looks_like_the_full_one():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    full = np.asarray(Image.open(io.BytesIO(saved(smooth, "JPEG"))).resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    reduced = decode_image(saved(smooth, "JPEG"), SIZE, LIMITS)

    assert np.abs(reduced.astype(int) - full.transpose(2, 0, 1)).mean() < 1.5


def test_too_many_bytes_are_refused_unread():
    assert refusal(b"\x89PNG" * 100, ImageLimits(max_bytes=399, max_pixels=1)).code == "image_too_large"


@pytest.mark.parametrize("side", [2_001, 60_000, 2_000_000_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    assert refusal(png(side, side)).code == "image_too_many_pixels"


def test_a_side_that_needs_too_much_memory_in_the_filter_is_refused():
    assert refusal(png(100_000, 1)).code == "image_too_many_pixels"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_compressed_text_bomb_is_skipped(kind):
    bomb = zlib.compress(b"\0" * 60_000_000, 9)
    body = {b"zTXt": b"k\0\0" + bomb, b"iTXt": b"k\0\x01\0\0\0" + bomb, b"iCCP": b"k\0\0" + bomb}[kind]
    pixels = png_chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 64) * 64))
    started = time.process_time()

    shown = decode_image(png(64, 64, png_chunk(kind, body), pixels), SIZE, LIMITS)

    assert corners(shown) == [(255, 0, 0)] * 4
    assert time.process_time() - started < 2.0


def gif_with_comment_blocks(num_blocks: int) -> bytes:
    header = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0)
    return header + b"!\xfe" + (b"\xff" + b"x" * 255) * num_blocks + b"\0;"


@pytest.mark.parametrize(
    "data",
    [
        png(64, 64, png_chunk(b"abCd", b"") * 300_000),
        gif_with_comment_blocks(15_000),
        b"\xff\xd8" + b"\xff\xe5\x00\x02" * 900_000,
    ],
    ids=["png", "gif", "jpeg"],
)
def test_a_file_of_tiny_chunks_is_refused_within_seconds(data):
    started = time.process_time()

    assert refusal(data).code == "image_too_complex"
    assert time.process_time() - started < 5.0


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8))


TRUNCATED = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("WEBP", {}),
    ("AVIF", {}),
    ("HEIF", {}),
]


@pytest.mark.parametrize(("image_format", "options"), TRUNCATED)
def test_half_a_picture_is_refused_and_not_shown_grey(image_format, options):
    if image_format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    data = saved(noise(), image_format, **options)

    assert refusal(data[: len(data) // 2]).code in {"image_truncated", "image_broken"}
    if image_format in {"JPEG", "PNG", "GIF"}:
        assert refusal(data[: len(data) // 2]).code == "image_truncated"


@pytest.mark.parametrize("missing", [1, 2, 3, 12, 13, 50])
@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("PNG", {}),
        ("BMP", {}),
    ],
)
def test_a_file_that_lacks_its_last_bytes_is_shown(image_format, options, missing):
    data = saved(noise(128), image_format, **options)
    whole = decode_image(data, SIZE, LIMITS).astype(int)

    shown = decode_image(data[:-missing], SIZE, LIMITS)

    assert np.abs(shown - whole).mean() < 1.0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_any_mode_is_shown_without_its_end_and_refused_without_its_half(mode):
    data = saved(noise(128).convert(mode), "JPEG")

    assert np.abs(decode_image(data[:-2], SIZE, LIMITS).astype(int) - decode_image(data, SIZE, LIMITS)).mean() < 1.0
    assert refusal(data[: len(data) // 2]).code == "image_truncated"


def test_a_jpeg_that_lacks_a_colour_is_refused():
    # One scan for each component: the first gives the brightness, the second and the third the colours.
    ycc = quadrants().convert("YCbCr")
    data = saved(ycc, "JPEG", progressive=True, quality=95)
    scans = [found for found in range(len(data)) if data[found : found + 2] == b"\xff\xda"]
    assert len(scans) > 3

    assert refusal(data[: scans[1] + 40]).code == "image_truncated"


def test_a_thumbnail_within_the_metadata_does_not_hide_a_missing_end():
    exif = b"Exif\0\0" + saved(noise(16), "JPEG")
    data = saved(noise(128), "JPEG", exif=exif)

    assert refusal(data[: len(data) // 2]).code == "image_truncated"


@pytest.mark.parametrize("rest", [b"\0" * 100, b"<html></html>", b"\r\n"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_bytes_behind_the_picture_are_ignored(image_format, rest):
    data = saved(quadrants(), image_format, **({"lossless": True} if image_format == "WEBP" else {"quality": 95}))

    assert_quadrants(decode_image(data + rest, SIZE, LIMITS), tolerance=60)


def test_an_interlaced_png_that_ends_early_is_shown():
    rng = np.random.default_rng(0)
    passes = []
    for left, top, across, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)):
        columns, rows = len(range(left, 64, across)), len(range(top, 64, down))
        passes += [b"\0" + rng.bytes(3 * columns) for _ in range(rows)]
    passes += [b"\0" + rng.bytes(3 * 64) for _ in range(32)]
    body = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 1)
    whole = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", body) + png_chunk(b"IDAT", zlib.compress(b"".join(passes)))

    shown = decode_image(whole[:-600], SIZE, LIMITS)

    assert np.abs(shown - decode_image(whole, SIZE, LIMITS).astype(int)).mean() < 12
    assert refusal(whole[: len(whole) // 2]).code == "image_truncated"


def test_a_wrong_checksum_of_a_chunk_that_holds_no_pixels_is_ignored():
    text = bytearray(png_chunk(b"tEXt", b"Comment\0hello"))
    text[-1] ^= 1
    pixels = png_chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 64) * 64))

    assert corners(decode_image(png(64, 64, bytes(text), pixels), SIZE, LIMITS)) == [(255, 0, 0)] * 4


@pytest.mark.parametrize("kind", [b"tRNS", b"eXIf", b"iCCP", b"gAMA", b"abCd"])
def test_any_damaged_optional_chunk_is_ignored(kind):
    chunk = bytearray(png_chunk(kind, b"\0\1\2\3\4\5"))
    chunk[9] ^= 0xFF
    pixels = png_chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 64) * 64))

    assert corners(decode_image(png(64, 64, bytes(chunk), pixels), SIZE, LIMITS)) == [(255, 0, 0)] * 4


def bmp_with_alpha(alpha: int) -> bytes:
    """A 32-bit BMP of 8 x 8 red pixels whose header declares a channel for transparency."""
    header = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, 256, 0, 0, 0, 0)
    masks = struct.pack("<IIIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, 0x73524742) + bytes(48)
    return b"BM" + struct.pack("<IHHI", 122 + 256, 0, 0, 122) + header + masks + bytes([0, 0, 255, alpha]) * 64


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_bmp_whose_transparency_channel_is_padding_is_opaque(alpha):
    assert corners(decode_image(bmp_with_alpha(alpha), SIZE, LIMITS)) == [(255, 0, 0)] * 4


def test_a_bmp_with_some_transparency_lies_on_white():
    data = bmp_with_alpha(0)[:-4] + bytes([0, 0, 255, 255])

    assert corners(decode_image(data, SIZE, LIMITS))[0] == (255, 255, 255)


def test_a_transparent_value_of_sixteen_bit_grey_lies_on_white():
    row = b"\0" + struct.pack(">4H", 1_000, 1_000, 40_000, 40_000)
    pixels = png_chunk(b"IDAT", zlib.compress(row * 4))
    data = png(4, 4, png_chunk(b"tRNS", struct.pack(">H", 1_000)), pixels, bits=16, colour=0)

    shown = decode_image(data, 4, LIMITS)[0, 0]

    assert shown[0] == 255
    assert shown[3] == pytest.approx(156, abs=1)


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def profile_with_red_and_green_exchanged() -> bytes:
    """A colour profile like sRGB, in which the first channel is green and the second is red."""
    red, green, blue = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + b"".join(map(s15, (0.9642, 1.0, 0.8249))),
        **{
            name: b"XYZ " + bytes(4) + b"".join(map(s15, colour))
            for name, colour in ((b"rXYZ", green), (b"gXYZ", red), (b"bXYZ", blue))
        },
        **{name: b"curv" + bytes(4) + struct.pack(">IHH", 1, 563, 0) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    header += bytes(68 - len(header)) + b"".join(map(s15, (0.9642, 1.0, 0.8249)))
    return header + bytes(128 - len(header)) + table + body


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colours_are_those_of_the_embedded_profile(image_format):
    exchanged = Image.merge("RGB", [quadrants().getchannel(channel) for channel in "GRB"])
    options = {"quality": 95, "subsampling": 0} if image_format == "JPEG" else {"quality": 95}
    options |= {"lossless": True} if image_format == "WEBP" else {}

    data = saved(exchanged, image_format, icc_profile=profile_with_red_and_green_exchanged(), **options)

    assert_quadrants(decode_image(data, SIZE, LIMITS), tolerance=16)


def test_transparency_is_kept_when_a_profile_is_applied():
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))

    data = saved(image, "PNG", icc_profile=profile_with_red_and_green_exchanged())

    expected = [(255, 255, 255), (255, 0, 0)] * 2
    np.testing.assert_allclose(corners(decode_image(data, SIZE, LIMITS)), expected, atol=4)


@pytest.mark.parametrize("profile", [b"", b"no profile", profile_with_red_and_green_exchanged()[:200]])
def test_an_invalid_profile_changes_nothing(profile):
    assert_quadrants(decode_image(saved(quadrants(), "PNG", icc_profile=profile), SIZE, LIMITS))


def test_a_profile_of_another_kind_of_image_changes_nothing():
    grey = Image.new("L", (8, 8), 100)

    data = saved(grey, "PNG", icc_profile=profile_with_red_and_green_exchanged())

    assert (decode_image(data, SIZE, LIMITS) == 100).all()


def test_heic_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(images, "_has_heic", lambda: False)

    error = refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))

    assert error.code == "image_format_refused"
    assert "pip install 'edje-rerank[heic]'" in str(error)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_a_photograph_of_a_phone_is_decoded(brand):
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = saved(quadrants(), "HEIF", quality=95)

    assert_quadrants(decode_image(data[:8] + brand + data[12:], SIZE, LIMITS), tolerance=8)


def test_too_many_pixels_of_heic_are_refused_by_the_header():
    pytest.importorskip("pillow_heif").register_heif_opener()

    assert refusal(saved(quadrants(), "HEIF"), ImageLimits(10**6, 64 * 63)).code == "image_too_many_pixels"


def test_every_format_has_its_name_suffixes():
    Image.init()
    known = {suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS}

    assert known <= SUFFIXES
    assert {".jfif", ".jpe", ".jif", ".heic", ".heif", ".avif"} <= SUFFIXES


def test_a_thumbnail_is_small_upright_and_without_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "camera"
    data = saved(noise(1000).resize((1000, 500)).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)

    thumbnail = make_thumbnail(data, LIMITS)

    shown = Image.open(io.BytesIO(thumbnail))
    assert (shown.format, shown.size, shown.mode) == ("WEBP", (256, 128), "RGB")
    assert len(thumbnail) <= 12_000
    assert not {"exif", "icc_profile", "xmp"} & shown.info.keys()


def test_a_thumbnail_shows_the_picture():
    data = saved(quadrants(600), "PNG", icc_profile=profile_with_red_and_green_exchanged())

    shown = np.asarray(Image.open(io.BytesIO(make_thumbnail(data, LIMITS))).resize((SIZE, SIZE)))

    expected = [(0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)]
    np.testing.assert_allclose(corners(shown.transpose(2, 0, 1)), expected, atol=40)


def test_a_thumbnail_that_stays_too_large_gets_smaller_in_size():
    opened = open_image(saved(noise(512), "PNG"), LIMITS, min_side=256)

    sizes = {limit: Image.open(io.BytesIO(opened.thumbnail(max_bytes=limit))).size for limit in (100_000, 6_000, 10)}

    assert sizes[100_000] == (256, 256)
    assert sizes[6_000][0] < 256
    assert sizes[10] == (1, 1)
    assert len(opened.thumbnail(max_bytes=6_000)) <= 6_000


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (100, 50)])
def test_a_small_or_narrow_picture_keeps_its_proportions_and_is_not_enlarged(size):
    shown = Image.open(io.BytesIO(make_thumbnail(saved(Image.new("RGB", size, "red"), "PNG"), LIMITS)))

    assert max(shown.size) == min(256, max(size))
    assert shown.size[0] <= size[0]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "not_an_image"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "image_broken"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "image_broken"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "image_format_refused"),
        (b"%PDF-1.7", "image_format_refused"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format_refused"),
        (saved(quadrants(), "ICO"), "not_an_image"),
    ],
)
def test_a_file_in_no_supported_format_is_refused_with_its_format(data, code):
    error = refusal(data)

    assert error.code == code
    assert len(str(error)) < 300


def test_pillows_warnings_are_suppressed():
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "broken")
    odd = [
        saved(Image.new("P", (8, 8)), "PNG", transparency=b"\0\1"),
        saved(quadrants(), "PNG", pnginfo=text),
        saved(quadrants(), "TIFF")[:200],
        png(10_000, 10_000),  # past the size at which Pillow warns, short of where it refuses
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for data in odd:
            try:
                decode_image(data, SIZE, ImageLimits(max_bytes=10**7, max_pixels=10**9))
            except ImageError:
                continue
    assert seen == []


SEEDS = [saved(quadrants(), name) for name in FORMATS] + [saved(quadrants(), "JPEG")[:-2], bmp_with_alpha(0)]


@settings(max_examples=150, deadline=None)
@given(seed=st.sampled_from(SEEDS), edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8))
def test_a_damaged_file_gives_pixels_or_an_image_error(seed, edits):
    data = bytearray(seed)
    for position, value in edits:
        data[position % len(data)] = value
    with contextlib.suppress(ImageError):
        assert decode_image(bytes(data), SIZE, LIMITS).shape == (3, SIZE, SIZE)


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_image(data):
    refusal(data)
