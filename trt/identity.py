"""The digest and the `EngineInfo` of an engine."""

from __future__ import annotations

import hashlib
from typing import Any

from edje.config import EdjeConfig
from trt.contract import EngineInfo
from trt.slab.layout import SlotLayout


def engine_digest(model_digest: str, runtime: str, *details: str) -> str:
    """Return a hash of the model, the runtime and all details that can change a score (precision, device, ...)."""
    return hashlib.sha256("\n".join((model_digest, runtime, *details)).encode()).hexdigest()[:16]


def engine_info(config: EdjeConfig, layout: SlotLayout, **given: Any) -> EngineInfo:
    """Return the info of an engine for this model and slot layout; `given` are all other fields."""
    read: dict[str, Any] = {
        "num_visual_tokens": layout.num_tokens,
        "token_dim": layout.token_dim,
        "storage": layout.storage,
        "image_size": config.preprocess.image_size,
        "max_text_tokens": config.preprocess.max_text_tokens,
        "resample": config.preprocess.resample,
    }
    return EngineInfo(**(read | given))
