"""Captions after frozen text layers, computed once and kept on the disk: most of the work of an encoder that reads
text and image apart, where the text layers are not trained."""

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
from edje.training.corpus import Captions

_CHUNK = 128


class TextStates:
    """States of all captions one after the other, float16, and where each begins."""

    def __init__(self, flat: NDArray[np.float16], lengths: NDArray[np.int64]) -> None:
        self._flat = flat
        self._lengths = lengths
        self._starts = np.concatenate(([0], np.cumsum(lengths)))

    def padded(self, numbers: NDArray[np.int64]) -> Tensor:
        """(W,) -> float32 (W, T, d), padded with zeros."""
        out = np.zeros((len(numbers), self._lengths[numbers].max(initial=1), self._flat.shape[1]), np.float32)
        for row, number in zip(out, numbers, strict=True):
            start, length = self._starts[number], self._lengths[number]
            row[:length] = self._flat[start : start + length]
        return torch.from_numpy(out)


@torch.inference_mode()
def text_states(
    model: Edje, captions: Captions, folder: Path, device: torch.device, *, shows_progress: bool
) -> TextStates:
    """From `folder` where these captions' states lie there already, else computed and left there."""
    digest = hashlib.sha256(captions.ids.tobytes() + captions.lengths.tobytes())
    for name, tensor in sorted(model.joint.state_dict().items()):
        if name.startswith(("words.", "positions.", "types.", "norm.", "text_layers.")):
            digest.update(f"\n{name}\n".encode() + tensor.cpu().contiguous().numpy().tobytes())
    path = folder / f"text-{digest.hexdigest()[:16]}.npy"
    try:
        return TextStates(np.load(path, mmap_mode="r"), captions.lengths)
    except (OSError, ValueError):  # not there, or not whole
        pass
    was_training = model.training
    model.eval()
    starts = np.concatenate(([0], np.cumsum(captions.lengths)))
    flat = np.empty((starts[-1], model.joint.words.weight.shape[1]), np.float16)
    by_length = np.argsort(captions.lengths, kind="stable")
    chunks = range(0, len(captions), _CHUNK)
    for start in track(chunks, "states of captions", enabled=shows_progress):
        numbers = by_length[start : start + _CHUNK]
        ids, lengths = captions.padded(numbers)
        states = model.encode_queries(ids.to(device), lengths.to(device)).cpu().numpy()
        for row, number in zip(states, numbers, strict=True):
            flat[starts[number] : starts[number + 1]] = row[: captions.lengths[number]]
    model.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    with draft_file(path) as draft:
        np.save(draft, flat)
    return TextStates(flat, captions.lengths)
