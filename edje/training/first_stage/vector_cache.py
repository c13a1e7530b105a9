"""Caches a published first stage's embeddings of captions and images on the disk.

Half precision changes a score by less than 1e-3, which matters only between equally hard negatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edje.files import draft_file
from edje.first_stage.base import FirstStageEncoder, Vectors
from edje.progress import track
from edje.training.batches.corpus import Captions

Half = NDArray[np.float16]
#: Captions or images between two writes.
_CHUNK = 4096


def cached_embeddings(
    model: FirstStageEncoder, captions: Captions, pooled: NDArray[np.floating], folder: Path, *, shows_progress: bool
) -> tuple[Half, Half]:
    """The embeddings of captions (C, e) and images (N, e): from `folder`, or computed and written there."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name}\n".encode() + tensor.cpu().contiguous().numpy().tobytes())
    model_digest = digest.hexdigest()
    caption_embeddings = _cached(
        folder / f"captions-{_key(model_digest, captions.texts)}.npy",
        (len(captions), model.dim),
        lambda rows: model.caption_vectors(captions.texts[rows], []),
        "first-stage embeddings of captions" if shows_progress else None,
    )
    content = hashlib.sha256(np.ascontiguousarray(pooled).data).hexdigest()
    image_embeddings = _cached(
        folder / f"images-{_key(model_digest, [content])}.npy",
        (len(pooled), model.dim),
        lambda rows: model.image_vectors(pooled[rows]),
        "first-stage embeddings of images" if shows_progress else None,
    )
    return caption_embeddings, image_embeddings


def _cached(path: Path, shape: tuple[int, int], compute: Callable[[slice], Vectors], title: str | None) -> Half:
    try:
        cached: Half = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # missing or incomplete
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_file(path) as draft:
            rows = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
            for start in track(range(0, shape[0], _CHUNK), title or "", enabled=title is not None):
                some = slice(start, start + _CHUNK)
                rows[some] = compute(some)
            rows.flush()
        cached = np.load(path, mmap_mode="r")
    return cached


def _key(model_digest: str, contents: Sequence[str]) -> str:
    digest = hashlib.sha256(model_digest.encode())
    for each in contents:
        digest.update(f"\n{each}".encode())
    return digest.hexdigest()[:16]
