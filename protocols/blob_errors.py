"""The errors of a token blob. A worker treats each as a missing image and counts it by its reason.

BlobError
  BlobMissing          the store has no blob
  BlobTruncated        the blob is too short
  BlobUndecodable      the value is not a token blob
  BlobVersionMismatch  another version of the format
  BlobModelMismatch    written by another model
  BlobShapeMismatch    another number of tokens, or of values per token
  BlobStorageMismatch  another storage type
  BlobCorrupt          the checksum does not match the content
"""

from __future__ import annotations

from typing import ClassVar


class BlobError(ValueError):
    """The blob cannot be used; `reason` is the stable word in metrics and logs."""

    reason: ClassVar[str]


class BlobMissing(BlobError):
    """The store has no blob."""

    reason = "missing"


class BlobTruncated(BlobError):
    """The blob is too short."""

    reason = "truncated"


class BlobUndecodable(BlobError):
    """The value is not a token blob."""

    reason = "undecodable"


class BlobVersionMismatch(BlobError):
    """The blob has another version of the format."""

    reason = "version_mismatch"


class BlobModelMismatch(BlobError):
    """Another model wrote the blob."""

    reason = "model_mismatch"


class BlobShapeMismatch(BlobError):
    """The blob has another number of tokens, or of values per token."""

    reason = "shape_mismatch"


class BlobStorageMismatch(BlobError):
    """The blob has another storage type."""

    reason = "storage_mismatch"


class BlobCorrupt(BlobError):
    """The checksum does not match the content."""

    reason = "corrupt"
