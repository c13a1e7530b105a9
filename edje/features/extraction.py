"""What a frozen tower sees in every image of a dataset, extracted once and then read from the disk as memory maps.

The features lie in a folder named by their key, a digest over the tower, its preprocessing, the dataset's images and
the stored type: whatever changes is extracted anew, and models share what they can. Images are decoded in threads
while the tower runs. An extraction can be killed at any time; the next one goes on where the last save was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from edje.config import EdjeConfig
from edje.data.dataset import DataError, Dataset
from edje.features.storage import Draft, Features, FeaturesError, open_features
from edje.images import ImageError, Resample
from edje.model.edje import Edje
from edje.progress import progress_bars
from edje.towers.base import onnx_graph

#: As many as decode faster than a small tower runs; more only contend with it for the processor.
DECODING_THREADS = min(8, os.cpu_count() or 1)
#: Batches decoded ahead of the tower.
_BATCHES_AHEAD = 2
#: Between two saves lie this many batches: seconds for a small tower, minutes for a large one on a processor.
_BATCHES_PER_SAVE = 16
_KEY_CHARS = 16


@dataclass(frozen=True, slots=True)
class Extractor:
    """A frozen tower behind its preprocessing; `digest` is over all that decides what it sees."""

    see: Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 (B, 3, H, W) -> (B, S, D), (B, E)
    image_size: int
    resample: Resample
    digest: str


def extractor_of(model: Edje, config: EdjeConfig) -> Extractor:
    """The tower of a model, on whatever device it is. What comes after the tower does not count."""
    digest = hashlib.sha256(b"edje extractor\n")
    preprocess = config.preprocess
    pixels = [preprocess.image_size, preprocess.mean, preprocess.std, preprocess.resample]
    digest.update(json.dumps([asdict(config.vision), pixels], sort_keys=True).encode())
    for name, tensor in sorted(model.vision.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(onnx_graph(model.vision) or b"")
    device = model.pixel_scale.device
    return Extractor(
        see=lambda pixels: model.run_tower(pixels.to(device)),
        image_size=preprocess.image_size,
        resample=preprocess.resample,
        digest=digest.hexdigest(),
    )


def pooled_only(extractor: Extractor) -> Extractor:
    """One that keeps the pooled embeddings alone: a thousandth of the disk."""

    def see(pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pooled = extractor.see(pixels)
        return tokens[:, :0], pooled

    return replace(extractor, see=see, digest=f"{extractor.digest} pooled")


def features_key(extractor: Extractor, dataset: Dataset, dtype: str) -> str:
    """Under which name the features of these images by this tower lie."""
    parts = json.dumps([extractor.digest, dataset.fingerprint, dtype])
    return hashlib.sha256(parts.encode()).hexdigest()[:_KEY_CHARS]


def extract(
    extractor: Extractor,
    dataset: Dataset,
    folder: Path,
    *,
    batch_size: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    strict: bool = False,
    console: Console | None = None,
) -> Features:
    """The features of a dataset: from `folder` where they lie there already, else extracted and left there.

    Images that do not decode are recorded with the dataset's problems and have no row in `Features.rows`; if `strict`,
    the first one is a `DataError`. Features that are not finite are a `FeaturesError`. Of several processes that call
    this at once, one works and the others wait.
    """
    key = features_key(extractor, dataset, dtype)
    place = folder / key
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / f".{key}.lock"):
        if not place.exists():
            draft = Draft(folder / f".{key}", len(dataset.images), dtype)
            _fill(draft, extractor, dataset, batch_size, np.dtype(dtype), strict, console)
            draft.publish(place, key, [image.image_id for image in dataset.images])
    features = open_features(place)
    for number, cause in features.unreadable.items():
        image_id = dataset.images[number].image_id
        dataset.problems.record("undecodable_image", image_id)
        if strict:
            raise _undecodable(dataset, number, cause)
    return features


def _fill(
    draft: Draft,
    extractor: Extractor,
    dataset: Dataset,
    batch_size: int,
    dtype: np.dtype[np.floating],
    strict: bool,
    console: Console | None,
) -> None:
    num_images = len(dataset.images)
    decoded = _decoded(extractor, dataset, draft.num_done, _BATCHES_AHEAD * batch_size)
    with progress_bars(console) as progress:
        task = progress.add_task(f"features of {dataset.name}", total=num_images, completed=draft.num_done)
        num_batches = 0
        while batch := list(islice(decoded, batch_size)):
            readable: list[tuple[int, NDArray[np.uint8]]] = []
            for number, pixels in batch:
                if isinstance(pixels, ImageError):
                    if strict:
                        raise _undecodable(dataset, number, str(pixels))
                    draft.unreadable[number] = str(pixels)
                else:
                    readable.append((number, pixels))
            if readable:
                rows = [number for number, _ in readable]
                draft.write(rows, *_seen(extractor, dataset, rows, np.stack([pixels for _, pixels in readable]), dtype))
            num_batches += 1
            if num_batches % _BATCHES_PER_SAVE == 0:
                draft.save(batch[-1][0] + 1)
            progress.advance(task, len(batch))


def _seen(
    extractor: Extractor, dataset: Dataset, rows: list[int], pixels: NDArray[np.uint8], dtype: np.dtype[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    with torch.inference_mode():
        tokens, pooled = (part.float().cpu().numpy() for part in extractor.see(torch.from_numpy(pixels)))
    with np.errstate(over="ignore"):  # found below
        stored = tokens.astype(dtype), pooled.astype(dtype)
    is_finite = np.isfinite(stored[0]).all(axis=(1, 2)) & np.isfinite(stored[1]).all(axis=1)
    if not is_finite.all():
        first = int(np.flatnonzero(~is_finite)[0])
        name = dataset.images[rows[first]].image_id
        if np.isfinite(tokens[first]).all() and np.isfinite(pooled[first]).all():
            raise FeaturesError(f"what the tower sees in image {name} is too large for {dtype}: store float32")
        raise FeaturesError(f"what the tower sees in image {name} is not finite: its weights are broken or its type is")
    return stored


def _decoded(
    extractor: Extractor, dataset: Dataset, start: int, num_ahead: int
) -> Iterator[tuple[int, NDArray[np.uint8] | ImageError]]:
    """Number and pixels of every image from `start` on, or why there are none, in order."""

    def pixels_of(number: int) -> NDArray[np.uint8] | ImageError:
        try:
            return dataset.pixels(number, extractor.image_size, extractor.resample)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(DECODING_THREADS, "decode") as pool:
        numbers = iter(range(start, len(dataset.images)))
        waiting = deque((number, pool.submit(pixels_of, number)) for number in islice(numbers, num_ahead))
        try:
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()
                waiting.extend((number, pool.submit(pixels_of, number)) for number in islice(numbers, 1))
        finally:
            for _, future in waiting:
                future.cancel()


def _undecodable(dataset: Dataset, number: int, cause: str) -> DataError:
    return DataError(
        f"{dataset.name}: {dataset.images[number].image_id} is image {number + 1:,} of {len(dataset.images):,} and "
        f"does not decode ({cause}): replace the file, or take the image out of the list"
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of this file; given back with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
