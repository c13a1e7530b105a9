"""Stored tokens equal, bit for bit, those that an engine reads, in every storage type."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.evaluation.errors import StorageImpossible
from edje.evaluation.storage import store_tokens
from protocols.blob import BlobLayout, decode_blobs
from protocols.quantize import StorageType
from trt.slab.host import HostSlab
from trt.slab.layout import SlotLayout
from trt.slab.torch_slab import dequantize

STORAGES = get_args(StorageType)


@pytest.mark.parametrize("storage", STORAGES)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
def test_the_tokens_equal_those_of_the_engines_dequantisation(storage, seed, size):
    tokens = (size * np.random.default_rng(seed).standard_t(3, (3, 4, 32))).astype(np.float32).clip(-6e4, 6e4)
    tokens[seed % 3, seed % 4] = 0  # a token of zeros has scale 0
    stored = store_tokens(tokens, storage, "digest")
    slab = HostSlab(SlotLayout(storage, 4, 32), num_slots=3)
    decode_blobs(BlobLayout("digest", 4, 32, storage), stored.blobs, slab.tokens, slab.scales, [0, 1, 2])

    seen = dequantize(slab.layout, torch.from_numpy(slab.tokens), torch.from_numpy(slab.scales)).numpy()

    assert stored.tokens.dtype == np.float32
    assert (stored.tokens == seen).all()


@pytest.mark.parametrize(
    ("storage", "payload"), [("fp16", 49_152), ("bf16", 49_152), ("int8", 24_576 + 256), ("int4", 12_288 + 1_536)]
)
def test_the_size_of_an_image_of_the_paper_is_that_of_the_wire_contract(storage, payload):
    stored = store_tokens(np.ones((2, 64, 384), np.float32), storage, "0123456789abcdef")

    assert stored.payload_bytes_per_image == payload
    assert {len(blob) for blob in stored.blobs} == {stored.blob_bytes_per_image}
    assert payload < stored.blob_bytes_per_image < payload + 200


def test_without_storage_the_tokens_are_those_of_the_model():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)

    stored = store_tokens(tokens, "none", "digest")

    assert (stored.tokens == tokens).all()
    assert (stored.payload_bytes_per_image, stored.blob_bytes_per_image, stored.blobs) == (60, None, ())


@pytest.mark.parametrize("storage", ["none", *STORAGES])
def test_the_error_for_tokens_that_are_not_finite_names_the_image(storage):
    tokens = np.zeros((3, 2, 32), np.float32)
    tokens[1, 0, 5] = np.nan

    with pytest.raises(StorageImpossible, match=r"image 1 .*not finite"):
        store_tokens(tokens, storage, "digest")


def test_tokens_too_large_for_half_precision_are_refused():
    with pytest.raises(StorageImpossible, match="image 0 cannot be stored as fp16: tokens hold a value too large"):
        store_tokens(np.full((1, 2, 32), 1e6, np.float32), "fp16", "digest")


def test_a_token_width_that_int4_cannot_store_is_refused():
    with pytest.raises(StorageImpossible, match="multiple of 32"):
        store_tokens(np.zeros((1, 2, 40), np.float32), "int4", "digest")


def test_the_error_for_an_unknown_storage_type_lists_the_known_ones():
    with pytest.raises(StorageImpossible, match=r"unknown storage 'fp4'.*none, fp16, bf16, int8, int4"):
        store_tokens(np.zeros((1, 2, 32), np.float32), "fp4", "digest")
