"""Small checkpoints of every encoder, and pictures to encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edje.init import write_untrained
from edje.model.variants import VARIANTS
from engine_contract import LATE_FUSION


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small checkpoint of every encoder."""
    root = tmp_path_factory.mktemp("engines")
    for name in ("tiny", *LATE_FUSION):
        write_untrained(VARIANTS[name], root / name, seed=1)
    return root


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Path) -> Path:
    return checkpoints / "tiny"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Twelve different smooth pictures; a pooling head maps all noise to nearly the same tokens."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(16, axis=2).repeat(16, axis=3)
