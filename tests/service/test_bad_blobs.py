"""Unusable values in the store are treated as missing and counted; other images are not affected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protocols.blob import blob_key, encode_blob
from service_harness import Service, reply_in

pytest_plugins = ["service_fixtures"]
pytestmark = pytest.mark.services


def test_unusable_blobs_are_missing_in_the_reply_and_counted_by_reason(service: Service):
    layout = service.checkpoint.layout
    tokens = np.ones((layout.num_tokens, layout.token_dim), np.float32)
    good = encode_blob(layout, tokens, bytes(32))
    blobs = {
        "good": good,
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "cut-off": good[:-10],
        "rubbish": b"rubbish",
        "other-model": encode_blob(replace(layout, model_digest="0" * 16), tokens, bytes(32)),
        "other-shape": encode_blob(replace(layout, num_tokens=8), tokens[:8], bytes(32)),
        "other-storage": encode_blob(replace(layout, storage="fp16"), tokens, bytes(32)),
    }
    service.write_blobs({blob_key(layout.model_digest, image): blob for image, blob in blobs.items()})
    worker = service.rerank()
    images = [*blobs, "not-there"]

    service.ask("mixed", images)
    service.ask("none", ["flipped"])
    service.flush()
    replies = service.replies().wait_ids(["mixed", "none"])

    mixed, none = reply_in(replies["mixed"][0]), reply_in(replies["none"][0])
    assert (mixed["status"], none["status"]) == ("partial", "partial")
    assert [result["id"] for result in mixed["results"]] == ["good"]
    assert mixed["missing"] == [image for image in images if image != "good"]
    assert (none["results"], none["missing"]) == ([], ["flipped"])
    reasons = {
        dict(labels)["reason"] for (name, labels), value in worker.metrics().items() if name == "edje_bad_blobs_total"
    }
    assert {"missing", "corrupt", "truncated", "undecodable"} <= reasons
    assert {"model_mismatch", "shape_mismatch", "storage_mismatch"} <= reasons
    assert "unusable blobs, treated as missing" in worker.log.read_text()
