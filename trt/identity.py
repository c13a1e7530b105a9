"""The engine digest: what a score depends on besides its inputs, in sixteen characters."""

from __future__ import annotations

import hashlib


def engine_digest(model_digest: str, runtime: str, *details: str) -> str:
    """Hash of the model, the runtime and whatever else of the engine can change a score (precision, device, ...)."""
    return hashlib.sha256("\n".join((model_digest, runtime, *details)).encode()).hexdigest()[:16]
