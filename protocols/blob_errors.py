"""What can be wrong with a token blob; a worker treats each as a missing image and counts it by its reason.

BlobError
  BlobMissing          the store has none
  BlobTruncated        it ends too early
  BlobUndecodable      it is not a token blob
  BlobVersionMismatch  another version of the format
  BlobModelMismatch    another model made it
  BlobShapeMismatch    another number of tokens, or of values a token
  BlobStorageMismatch  stored in another type
  BlobCorrupt          its checksum does not fit its content
"""

from __future__ import annotations

from typing import ClassVar


class BlobError(ValueError):
    """The blob cannot be used; `reason` is the stable word that metrics and logs carry."""

    reason: ClassVar[str]


class BlobMissing(BlobError):
    """The store has none."""

    reason = "missing"


class BlobTruncated(BlobError):
    """It ends too early."""

    reason = "truncated"


class BlobUndecodable(BlobError):
    """It is not a token blob in the form above."""

    reason = "undecodable"


class BlobVersionMismatch(BlobError):
    """It is of another version of this format."""

    reason = "version_mismatch"


class BlobModelMismatch(BlobError):
    """Another model made it."""

    reason = "model_mismatch"


class BlobShapeMismatch(BlobError):
    """It has another number of tokens or values a token."""

    reason = "shape_mismatch"


class BlobStorageMismatch(BlobError):
    """Its tokens are stored in another type."""

    reason = "storage_mismatch"


class BlobCorrupt(BlobError):
    """Its checksum does not fit its content."""

    reason = "corrupt"
