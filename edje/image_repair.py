"""Repairs image files that other programs can show but Pillow rejects, by rewriting their bytes before decoding.

PNG: every chunk that does not change the pixels is dropped, and so is an optional chunk with a wrong checksum.
JPEG, PNG, BMP: a file that ends early is completed if at most `MAX_MISSING` of its pixel rows are missing.

A file that needs no repair, and one that cannot be repaired, is returned unchanged. Knows the formats' containers, and
decodes no pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

#: Largest share of the pixel rows that may be missing at the end of a file.
MAX_MISSING = 0.1
#: More chunks than this are not examined one by one; an ordinary PNG of 20 MB has about 2,500 (of 8 KiB each).
_MAX_CHUNKS = 20_000
#: Colour profiles are rarely above 1 MiB, and Pillow refuses a larger one.
_MAX_PROFILE_BYTES = 1 << 20

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Optional chunks that change the pixels: transparency, orientation and colour profile.
_USED_CHUNKS = {b"tRNS", b"eXIf", b"iCCP"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG colour type
#: First column and row, and distance of columns and rows, of the passes of an interlaced PNG.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

_JPEG_END = b"\xff\xd9"
#: The next marker within compressed data: neither a stuffed byte, nor a restart marker, nor a fill byte.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_NUM_COEFFICIENTS = 64


@dataclass(frozen=True, slots=True)
class Repaired:
    """The bytes to decode.

    `ends_early`: the end was added and the number of missing rows is unknown; the decoder fills them with mid-grey.
    """

    data: bytes
    ends_early: bool = False


def repair(data: bytes, max_pixels: int) -> Repaired:
    """The file, repaired where necessary and possible. Takes no more memory than the file and little more time."""
    if data.startswith(_PNG_SIGNATURE):
        return Repaired(_repaired_png(data, max_pixels))
    if data.startswith(b"\xff\xd8\xff"):
        return _repaired_jpeg(data)
    if data.startswith(b"BM"):
        return Repaired(_repaired_bmp(data))
    if data.startswith(b"RIFF") and int.from_bytes(data[4:8], "little") + 8 == len(data) + 1:
        return Repaired(data + b"\0")  # WebP without the padding of its last chunk
    return Repaired(data)


def _repaired_png(data: bytes, max_pixels: int) -> bytes:
    kept = [_PNG_SIGNATURE]
    compressed: list[bytes] = []  # IDAT, of a file that ends early
    ends_early = True
    for number, (kind, chunk) in enumerate(_png_chunks(data)):
        if number == _MAX_CHUNKS:
            return data
        is_whole = len(chunk) == 12 + struct.unpack_from(">I", chunk)[0]
        if kind == b"IDAT":
            compressed.append(chunk[8:-4] if is_whole else chunk[8:])
        if not is_whole:
            break
        is_optional = bool(kind[0] & 0x20)
        if not is_optional or _is_used(kind, chunk):
            kept.append(chunk)
        if kind == b"IEND":
            ends_early = False
            break
    if ends_early and compressed:
        completed = _completed_image_data(kept[1], b"".join(compressed), max_pixels) if len(kept) > 1 else None
        if completed is None:
            return data
        before = [chunk for chunk in kept[1:] if chunk[4:8] != b"IDAT"]
        kept = [_PNG_SIGNATURE, *before, _png_chunk(b"IDAT", completed), _png_chunk(b"IEND", b"")]
    return b"".join(kept)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each chunk, the last one perhaps cut off."""
    start = len(_PNG_SIGNATURE)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, data[start : start + 12 + length]
        start += 12 + length


def _is_used(kind: bytes, chunk: bytes) -> bool:
    if kind not in _USED_CHUNKS or zlib.crc32(chunk[4:-4]) != struct.unpack(">I", chunk[-4:])[0]:
        return False
    if kind != b"iCCP":
        return True
    _, _, compressed = chunk[8:-4].partition(b"\0")
    try:
        inflate = zlib.decompressobj()
        inflate.decompress(compressed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return False
    return inflate.eof


def _completed_image_data(header: bytes, compressed: bytes, max_pixels: int) -> bytes | None:
    """Image data that lacks at most `MAX_MISSING`, filled with zeros; None if more is missing."""
    size = _image_data_size(header, max_pixels)
    if size is None:
        return None
    inflate, deflate = zlib.decompressobj(), zlib.compressobj(1)
    parts, num_found = [], 0
    try:
        rest = compressed
        while num_found < size:
            piece = inflate.decompress(rest, 1 << 16)
            if not piece:
                break
            num_found += len(piece)
            parts.append(deflate.compress(piece))
            rest = inflate.unconsumed_tail
    except zlib.error:  # damaged from here on
        pass
    if num_found < (1 - MAX_MISSING) * size:
        return None
    for start in range(num_found, size, 1 << 16):
        parts.append(deflate.compress(bytes(min(1 << 16, size - start))))
    return b"".join((*parts, deflate.flush()))


def _image_data_size(header: bytes, max_pixels: int) -> int | None:
    """Bytes of the decompressed image data, from the chunk IHDR; None for an invalid or too large image."""
    if len(header) != 25 or header[4:8] != b"IHDR":
        return None
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", header, 8)
    if colour not in _CHANNELS or bits > 16 or width * height > max_pixels:
        return None
    total = 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8)
    return total


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _repaired_jpeg(data: bytes) -> Repaired:
    if data.endswith(_JPEG_END) or not _lacks_only_its_end(data):
        return Repaired(data)
    return Repaired(data.rstrip(b"\xff") + _JPEG_END, ends_early=True)


def _lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG ends within its last scan: every coefficient of every component was begun in full precision."""
    components: set[int] = set()
    final: dict[int, set[int]] = {}  # component: coefficients whose last bit is in one of the scans
    start = 2
    for _ in range(_MAX_CHUNKS):
        marker = data[start + 1 : start + 2]
        if data[start : start + 1] != b"\xff" or not marker or start + 4 > len(data):
            return False
        code, (length,) = marker[0], struct.unpack_from(">H", data, start + 2)
        body = data[start + 4 : start + 2 + length]
        start += 2 + length
        if start > len(data):
            return False
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            components = set(body[6::3])
        if code != _START_OF_SCAN:
            continue
        _add_scan(final, body)
        found = _NEXT_MARKER.search(data, start)
        if found is None:
            break
        start = found.start()
        if data[start + 1] == _END_OF_IMAGE:
            return False
    else:
        return False
    return bool(components) and all(len(final.get(each, ())) == _NUM_COEFFICIENTS for each in components)


def _add_scan(final: dict[int, set[int]], header: bytes) -> None:
    """Add the coefficients that a scan completes, from its header."""
    if len(header) < 4 or len(header) != 4 + 2 * header[0]:
        return
    first, last, bits = header[-3:]
    if bits & 0x0F == 0:
        for component in header[1:-3:2]:
            final.setdefault(component, set()).update(range(first, min(last + 1, _NUM_COEFFICIENTS)))


def _repaired_bmp(data: bytes) -> bytes:
    if len(data) < 34 or struct.unpack_from("<I", data, 14)[0] < 40:
        return data
    (start,) = struct.unpack_from("<I", data, 10)
    width, height = struct.unpack_from("<ii", data, 18)
    (bits,) = struct.unpack_from("<H", data, 28)
    (compression,) = struct.unpack_from("<I", data, 30)
    size = start + (max(width, 0) * bits + 31) // 32 * 4 * abs(height)
    is_uncompressed = compression in (0, 3)
    if not is_uncompressed or not len(data) < size <= len(data) / (1 - MAX_MISSING):
        return data
    return data + bytes(size - len(data))
