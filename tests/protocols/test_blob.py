"""Token blobs: what is stored comes back, and whatever is wrong with one is named."""

import hashlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from xxhash import xxh3_64_digest

from protocols.blob import (
    BlobCorrupt,
    BlobError,
    BlobLayout,
    BlobMissing,
    BlobModelMismatch,
    BlobShapeMismatch,
    BlobStorageMismatch,
    BlobTruncated,
    BlobUndecodable,
    BlobVersionMismatch,
    content_sha256_of,
    decode_blobs,
    dequantize,
    encode_blob,
)
from protocols.source_position import HEAD_BYTES, POSITION_AT, SourcePosition, position_of, removal_marker

SHA256 = hashlib.sha256(b"image").digest()
STORAGES = ["fp16", "bf16", "int8", "int4"]
every_storage = pytest.mark.parametrize("storage", STORAGES)


def layout(storage="int8", num_tokens=4, token_dim=64, model_digest="m-1"):
    return BlobLayout(model_digest, num_tokens, token_dim, storage)


def tokens_for(of, seed=0):
    return np.random.default_rng(seed).standard_normal((of.num_tokens, of.token_dim)).astype(np.float32)


def blob_for(of, seed=0):
    return encode_blob(of, tokens_for(of, seed), SHA256)


def arrays_for(of, num_rows=1):
    return np.zeros((num_rows, of.token_bytes), np.uint8), np.zeros((num_rows, of.scale_bytes), np.uint8)


def decoded(of, blob):
    tokens, scales = arrays_for(of)
    assert decode_blobs(of, [blob], tokens, scales, [0]) == [None]
    return dequantize(of, tokens[0], scales[0])


def error_of(of, blob):
    tokens, scales = arrays_for(of)
    [error] = decode_blobs(of, [blob], tokens, scales, [0])
    assert not tokens.any()
    assert not scales.any()
    return error


@pytest.mark.parametrize(
    ("storage", "token_bytes", "scale_bytes"),
    [("fp16", 49_152, 0), ("bf16", 49_152, 0), ("int8", 24_576, 256), ("int4", 12_288, 1_536)],
)
def test_the_headline_shape_has_the_published_sizes(storage, token_bytes, scale_bytes):
    headline = layout(storage, 64, 384, "a" * 64)

    assert (headline.token_bytes, headline.scale_bytes) == (token_bytes, scale_bytes)
    assert headline.blob_bytes == len(blob_for(headline)) < token_bytes + scale_bytes + 250


@every_storage
def test_a_blob_is_a_plain_msgpack_map(storage):
    of = layout(storage)
    fields = msgpack.unpackb(blob_for(of))
    tokens, scales = arrays_for(of)
    decode_blobs(of, [blob_for(of)], tokens, scales, [0])

    assert list(fields) == [
        "version", "position", "model", "shape", "storage", "checksum", "sha256", "scales", "tokens"
    ]  # fmt: skip
    assert (fields["version"], fields["model"], fields["shape"], fields["storage"]) == (2, "m-1", [4, 64], storage)
    assert (fields["sha256"], fields["tokens"], fields["scales"]) == (SHA256, tokens.tobytes(), scales.tobytes())
    body = blob_for(of)[blob_for(of).index(fields["checksum"]) + 8 :]
    assert fields["checksum"] == xxh3_64_digest(body)


_values = st.floats(-(2.0**14), 2.0**14, width=32)


@given(tokens=hnp.arrays(np.float32, (4, 64), elements=_values), storage=st.sampled_from(STORAGES))
def test_a_round_trip_stays_within_half_a_step(tokens, storage):
    of = layout(storage)
    largest = np.abs(tokens).max(axis=1, keepdims=True)
    in_group = np.abs(tokens.reshape(4, 2, 32)).max(axis=2).repeat(32, axis=1)
    smallest_half = 2.0**-25  # half of the smallest float16
    bound = {
        "fp16": np.abs(tokens) * 2.0**-11 + smallest_half,
        "bf16": np.abs(tokens) * 2.0**-8 + 1e-38,
        "int8": largest / 127 * 0.5001 + 1e-38,
        # A float16 scale is off by up to 2^-11 of itself, or by half its smallest step: seven times that at the end.
        "int4": in_group / 7 * (0.5 + 7 * 2.0**-11) * 1.001 + 7.5 * smallest_half,
    }[storage]

    error = np.abs(decoded(of, encode_blob(of, tokens, SHA256)) - tokens)

    assert (error <= bound).all()


@pytest.mark.parametrize(
    ("storage", "heavy_tails", "bound"),
    [
        ("fp16", False, 0.0003),
        ("bf16", False, 0.002),
        ("int8", False, 0.008),
        ("int4", False, 0.11),
        ("int8", True, 0.03),
        ("int4", True, 0.16),
    ],
)
def test_the_error_added_is_the_one_the_documentation_states(storage, heavy_tails, bound):
    rng = np.random.default_rng(3)
    of = layout(storage, 64, 384)
    tokens = (rng.standard_t(3, (64, 384)) if heavy_tails else rng.standard_normal((64, 384))).astype(np.float32)

    difference = decoded(of, encode_blob(of, tokens, SHA256)) - tokens

    assert np.sqrt((difference**2).mean() / (tokens**2).mean()) < bound


@every_storage
def test_tokens_of_zeros_come_back_as_zeros(storage):
    of = layout(storage)

    assert not decoded(of, encode_blob(of, np.zeros((4, 64), np.float32), SHA256)).any()


def test_the_low_nibble_holds_the_even_value():
    of = layout("int4", 1, 32)
    tokens = np.zeros((1, 32), np.float32)
    tokens[0, :2] = 7.0, -7.0
    stored, scales = arrays_for(of)

    decode_blobs(of, [encode_blob(of, tokens, SHA256)], stored, scales, [0])

    assert stored[0, 0] == (7 + 8) | (-7 + 8) << 4
    assert scales.view("<f2").tolist() == [[1.0]]


@every_storage
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(storage, value):
    tokens = tokens_for(layout(storage))
    tokens[2, 5] = value

    with pytest.raises(ValueError, match="not finite"):
        encode_blob(layout(storage), tokens, SHA256)


@pytest.mark.parametrize(("storage", "value"), [("fp16", 65_536.0), ("bf16", 3.4e38), ("int4", 500_000.0)])
def test_a_value_the_storage_cannot_hold_is_refused(storage, value):
    tokens = tokens_for(layout(storage))
    tokens[2, 5] = value

    with pytest.raises(ValueError, match=f"too large for {storage}"):
        encode_blob(layout(storage), tokens, SHA256)


def test_tokens_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected"):
        encode_blob(layout(), np.zeros((4, 32), np.float32), SHA256)


@pytest.mark.parametrize(
    "fields", [("", 4, 64, "int8"), ("m" * 129, 4, 64, "int8"), ("m", 0, 64, "int8"), ("m", 4, 48, "int4"),
               ("m", 4, 64, "fp8"), ("m", 4, 2**20, "int8")],
)  # fmt: skip
def test_an_impossible_layout_is_refused(fields):
    with pytest.raises(ValueError, match=r"digest|holds 1 to|multiple|unknown"):
        BlobLayout(*fields)


@every_storage
def test_each_blob_lands_in_its_row_and_bad_ones_leave_theirs_alone(storage):
    of = layout(storage)
    tokens, scales = arrays_for(of, 5)
    blobs = [blob_for(of, 1), None, blob_for(of, 2), b"rubbish"]

    errors = decode_blobs(of, blobs, tokens, scales, [4, 0, 2, 1])

    assert [type(error) for error in errors] == [type(None), BlobMissing, type(None), BlobUndecodable]
    for row, seed in ((4, 1), (2, 2)):
        np.testing.assert_allclose(dequantize(of, tokens[row], scales[row]), tokens_for(of, seed), atol=0.4)
    assert not tokens[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (layout(model_digest="m-2"), BlobModelMismatch),
        (layout(model_digest="a-longer-digest"), BlobModelMismatch),
        (layout("fp16", 300, 384, "d" * 128), BlobModelMismatch),
        (layout(num_tokens=8), BlobShapeMismatch),
        (layout(token_dim=32), BlobShapeMismatch),
        (layout("fp16"), BlobStorageMismatch),
        (layout("int4"), BlobStorageMismatch),
    ],
)
def test_a_blob_of_another_layout_says_in_what_it_differs(other, expected):
    assert type(error_of(layout(), blob_for(other))) is expected


def test_a_blob_of_another_version_is_named_whatever_follows():
    assert type(error_of(layout(), msgpack.packb({"version": 3, "anything": 1}))) is BlobVersionMismatch


@given(num_bytes=st.integers(0, layout().blob_bytes - 1))
def test_a_blob_cut_anywhere_is_truncated(num_bytes):
    assert type(error_of(layout(), blob_for(layout())[:num_bytes])) is BlobTruncated


@given(at=st.integers(0, 10_000), mask=st.integers(1, 255), storage=st.sampled_from(STORAGES))
def test_a_changed_byte_is_noticed_everywhere_but_in_the_position(at, mask, storage):
    blob = bytearray(blob_for(layout(storage)))
    at %= len(blob) - 16
    blob[at if at < POSITION_AT else at + 16] ^= mask

    assert isinstance(error_of(layout(storage), bytes(blob)), BlobError)


def test_a_changed_token_is_a_broken_checksum():
    blob = bytearray(blob_for(layout()))
    blob[-1] ^= 1

    assert type(error_of(layout(), bytes(blob))) is BlobCorrupt


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda fields: dict(reversed(fields.items())),
        lambda fields: {**fields, "more": 1},
        lambda fields: {**fields, "shape": "4x64"},
        lambda fields: {**fields, "sha256": b"short"},
        lambda fields: {**fields, "storage": ["int8"]},
    ],
)
def test_a_map_in_another_form_is_undecodable(rewrite):
    blob = msgpack.packb(rewrite(msgpack.unpackb(blob_for(layout()))))

    assert type(error_of(layout(), blob)) is BlobUndecodable


def test_the_position_of_the_event_is_readable_and_does_not_change_the_tokens():
    blob = encode_blob(layout(), tokens_for(layout()), SHA256, SourcePosition(7, 1_000))

    assert position_of(blob) == (7, 1_000)
    assert blob[HEAD_BYTES:] == blob_for(layout())[HEAD_BYTES:]
    np.testing.assert_array_equal(decoded(layout(), blob), decoded(layout(), blob_for(layout())))


def test_the_marker_of_a_removed_image_is_a_missing_blob():
    error = error_of(layout(), removal_marker(SourcePosition(7, 1_000)))

    assert type(error) is BlobMissing
    assert "removed" in str(error)


def test_trailing_bytes_are_undecodable():
    assert type(error_of(layout(), blob_for(layout()) + b"\x00")) is BlobUndecodable


@given(blob=st.binary(max_size=600))
def test_arbitrary_bytes_are_a_blob_error(blob):
    assert isinstance(error_of(layout(), blob), BlobError)


@every_storage
@pytest.mark.parametrize("model_digest", ["m", "d" * 128])
def test_a_good_blob_holds_the_sha256_of_its_image_file(storage, model_digest):
    of = layout(storage, 300, 384, model_digest)

    assert content_sha256_of(of, blob_for(of)) == SHA256


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), BlobCorrupt),
        (lambda blob: blob[:-1], BlobTruncated),
        (lambda blob: blob + b"\x00", BlobUndecodable),
        (lambda blob: blob_for(layout("fp16")), BlobStorageMismatch),
        (lambda blob: blob_for(layout(model_digest="m-2")), BlobModelMismatch),
    ],
)
def test_the_sha256_of_a_bad_blob_is_not_read(spoil, expected):
    with pytest.raises(expected):
        content_sha256_of(layout(), spoil(blob_for(layout())))


def test_every_error_has_its_own_reason():
    errors = BlobError.__subclasses__()

    assert len({error.reason for error in errors}) == len(errors) == 8


@pytest.mark.parametrize(
    ("tokens", "scales", "rows"),
    [((1, 9), (1, 16), [0]), ((1, 256), (1, 9), [0]), ((1, 256), (1, 16), [1]), ((1, 256), (1, 16), [-1])],
)
def test_arrays_and_rows_that_do_not_fit_are_a_bug_and_not_a_blob_error(tokens, scales, rows):
    with pytest.raises((ValueError, IndexError), match="rows"):
        decode_blobs(layout(), [None], np.zeros(tokens, np.uint8), np.zeros(scales, np.uint8), rows)
