"""What a published first stage says of millions of captions and images, computed once and mapped from the disk.

In half precision: the sums in which they are compared come out within 1e-3, and two hard negatives as near as that to
each other may as well change places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edje.files import draft_file
from edje.first_stage.dual_encoder import FirstStage, Vectors
from edje.progress import track
from edje.training.corpus import Captions

Half = NDArray[np.float16]
#: Captions or images between two writes.
_CHUNK = 4096


def kept_vectors(
    model: FirstStage, captions: Captions, pooled: NDArray[np.floating], folder: Path, *, shows_progress: bool
) -> tuple[Half, Half]:
    """Every caption (C, e) and every image (N, e): from `folder` where they lie there already, else left there."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name}\n".encode() + tensor.cpu().contiguous().numpy().tobytes())
    own = digest.hexdigest()
    texts = _kept(
        folder / f"captions-{_named(own, captions.texts)}.npy",
        (len(captions), model.dim),
        lambda rows: model.caption_vectors(captions.texts[rows], []),
        "captions for the first stage" if shows_progress else None,
    )
    # The pooled embeddings have a name already where they come from, but a change of a single one must show.
    images = _kept(
        folder / f"images-{_named(own, [hashlib.sha256(np.ascontiguousarray(pooled).data).hexdigest()])}.npy",
        (len(pooled), model.dim),
        lambda rows: model.image_vectors(pooled[rows]),
        "images for the first stage" if shows_progress else None,
    )
    return texts, images


def _kept(path: Path, shape: tuple[int, int], compute: Callable[[slice], Vectors], title: str | None) -> Half:
    try:
        kept: Half = np.load(path, mmap_mode="r")
    except (OSError, ValueError):  # not there, or not whole
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft_file(path) as draft:
            rows = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
            for start in track(range(0, shape[0], _CHUNK), title or "", enabled=title is not None):
                some = slice(start, start + _CHUNK)
                rows[some] = compute(some)
            rows.flush()
        kept = np.load(path, mmap_mode="r")
    return kept


def _named(own: str, contents: Sequence[str]) -> str:
    digest = hashlib.sha256(own.encode())
    for each in contents:
        digest.update(f"\n{each}".encode())
    return digest.hexdigest()[:16]
