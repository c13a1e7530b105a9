"""Caches the output of frozen text layers for all captions. Computing it would be most of the work of a step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edje.files import draft_file
from edje.model.edje import Edje
from edje.progress import track
from edje.training.batches.corpus import Captions
from edje.training.batches.negatives import Ints

_CHUNK = 128


class TextStates:
    """The states of all captions, concatenated in float16 (sum of lengths, d)."""

    def __init__(self, flat: NDArray[np.float16], lengths: Ints) -> None:
        self._flat = flat
        self._lengths = lengths
        self._starts = np.concatenate(([0], np.cumsum(lengths)))

    def padded(self, captions: Ints) -> Tensor:
        """The states of some captions (W,): float32 (W, T, d), padded with zeros."""
        out = np.zeros((len(captions), self._lengths[captions].max(initial=1), self._flat.shape[1]), np.float32)
        for row, index in zip(out, captions, strict=True):
            start, length = self._starts[index], self._lengths[index]
            row[:length] = self._flat[start : start + length]
        return torch.from_numpy(out)


@torch.inference_mode()
def cached_text_states(
    model: Edje, captions: Captions, folder: Path, device: torch.device, *, shows_progress: bool
) -> TextStates:
    """The states of the captions: read from `folder` if they are there, else computed and written there."""
    digest = hashlib.sha256(captions.ids.tobytes() + captions.lengths.tobytes())
    for name, tensor in sorted(model.joint.state_dict().items()):
        if name.startswith(("words.", "positions.", "types.", "norm.", "text_layers.")):
            digest.update(f"\n{name}\n".encode() + tensor.cpu().contiguous().numpy().tobytes())
    path = folder / f"text-{digest.hexdigest()[:16]}.npy"
    try:
        return TextStates(np.load(path, mmap_mode="r"), captions.lengths)
    except (OSError, ValueError):  # missing or incomplete
        pass
    was_training = model.training
    model.eval()
    starts = np.concatenate(([0], np.cumsum(captions.lengths)))
    flat = np.empty((starts[-1], model.joint.words.weight.shape[1]), np.float16)
    by_length = np.argsort(captions.lengths, kind="stable")
    chunks = range(0, len(captions), _CHUNK)
    for start in track(chunks, "text states", enabled=shows_progress):
        indices = by_length[start : start + _CHUNK]
        ids, lengths = captions.padded(indices)
        states = model.encode_queries(ids.to(device), lengths.to(device)).cpu().numpy()
        for row, index in zip(states, indices, strict=True):
            flat[starts[index] : starts[index + 1]] = row[: captions.lengths[index]]
    model.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    with draft_file(path) as draft:
        np.save(draft, flat)
    return TextStates(flat, captions.lengths)
