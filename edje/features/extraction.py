"""Extracts the features of a dataset's images with a frozen tower, and stores them.

Features are stored by tower, preprocessing and image: an image that was added or changed is extracted, all others are
read from the disk, whichever dataset they belong to. Several processes can share the work. Images are decoded in
threads while the tower runs. An extraction that is stopped loses at most one shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from edje.config import EdjeConfig
from edje.data.dataset import Dataset, undecodable
from edje.data.image_files import FileUnreadable
from edje.features.storage import Features, FeaturesError, FeatureStore, Half, Keys, Unreadable, key_of, write_shard
from edje.images import ImageError, Resample
from edje.model.edje import Edje
from edje.progress import progress_bars
from edje.towers.base import onnx_graph

#: Enough to decode faster than a small tower runs; more threads only compete with the tower for the processor.
DECODING_THREADS = min(8, os.cpu_count() or 1)
#: Batches that are decoded ahead of the tower.
_BATCHES_AHEAD = 2
#: Limits of a shard: seconds of work for a small tower, minutes for a large one on a processor.
_MAX_SHARD_BYTES, _MAX_SHARD_ROWS = 64 << 20, 4096
_KEY_CHARS = 16


@dataclass(frozen=True, slots=True)
class Extractor:
    """A frozen tower with its preprocessing. `digest` identifies everything that its output depends on."""

    run: Callable[[Tensor], tuple[Tensor, Tensor]]  # uint8 (B, 3, H, W) -> (B, S, D), (B, E)
    image_size: int
    resample: Resample
    digest: str


def extractor_of(model: Edje, config: EdjeConfig) -> Extractor:
    """The tower of a model, on the model's device; in bf16 on a GPU. The rest of the model has no influence."""
    digest = hashlib.sha256(b"edje extractor\n")
    preprocess = config.preprocess
    pixels = [preprocess.image_size, preprocess.mean, preprocess.std, preprocess.resample]
    digest.update(json.dumps([asdict(config.vision), pixels], sort_keys=True).encode())
    for name, tensor in sorted(model.vision.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(onnx_graph(model.vision) or b"")
    device = model.pixel_scale.device
    in_bf16 = device.type == "cuda"

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16) if in_bf16 else nullcontext():
            return model.run_tower(pixels.to(device))

    return Extractor(
        run=run,
        image_size=preprocess.image_size,
        resample=preprocess.resample,
        digest=digest.hexdigest() + (" bf16" if in_bf16 else ""),
    )


def pooled_only(extractor: Extractor) -> Extractor:
    """An extractor that stores pooled embeddings alone, a thousandth of the size."""

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens, pooled = extractor.run(pixels)
        return tokens[:, :0], pooled

    return replace(extractor, run=run, digest=f"{extractor.digest} pooled")


def extract(
    extractor: Extractor,
    dataset: Dataset,
    folder: Path,
    *,
    batch_size: int = 32,
    strict: bool = False,
    console: Console | None = None,
    rank: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Features:
    """The features of a dataset: read from `folder`, and extracted and stored where they are missing.

    Each of `num_processes` connected processes extracts its share and calls `wait`, which returns when all have called
    it. Images that cannot be decoded are recorded in the dataset's problems and have no row in `Features.rows`; with
    `strict` they raise `DataError`. Raises `FeaturesError` for features that are not finite.
    """
    store_folder = folder / hashlib.sha256(extractor.digest.encode()).hexdigest()[:_KEY_CHARS]
    store_folder.mkdir(parents=True, exist_ok=True)
    image_keys = np.array([key_of(dataset.image_key(index)) for index in range(len(dataset.images))], np.uint64)
    # Without connected processes, a second one waits here and then finds the features.
    with _locked(store_folder / f".{rank}-of-{num_processes}.lock"):
        store = FeatureStore(store_folder)
        missing = _missing(store, image_keys)
        share = missing[image_keys[missing] % np.uint64(num_processes) == rank]
        if len(share):
            _Extraction(extractor, dataset, store_folder, store, image_keys, batch_size, console).run(share)
    wait()
    if len(missing):
        store = FeatureStore(store_folder)
    positions = store.positions(image_keys)
    unreadable = {}
    for index in np.flatnonzero(positions < 0).tolist():
        found = store.unreadable.get(int(image_keys[index]))
        if found is None:
            raise FeaturesError(
                f"{store_folder} lacks features of {dataset.images[index].image_id}: run the command again"
            )
        unreadable[index] = found.cause
    for index, cause in unreadable.items():
        dataset.problems.record("undecodable_image", dataset.images[index].image_id)
        if strict:
            raise undecodable(dataset, index, cause)
    if len(unreadable) == len(positions):
        causes = "; ".join(sorted(set(unreadable.values()))[:3])
        raise FeaturesError(f"{dataset.name}: none of {len(positions)} images can be read ({causes}): check the files")
    return store.features([image.image_id for image in dataset.images], positions, unreadable)


def _missing(store: FeatureStore, image_keys: Keys) -> NDArray[np.int64]:
    """Return the indices of images without features, except images that are permanently unreadable."""
    without_row = np.flatnonzero(store.positions(image_keys) < 0)
    settled = {key for key, each in store.unreadable.items() if not each.is_temporary}
    return np.array([index for index in without_row if int(image_keys[index]) not in settled], np.int64)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One image: its pixels, the position of its content in the store, or the problem that prevents both."""

    index: int
    content_key: int
    pixels: NDArray[np.uint8] | None = None
    position: int = -1
    problem: Unreadable | None = None


class _Extraction:
    """Extracts some images of a dataset into shards."""

    def __init__(
        self,
        extractor: Extractor,
        dataset: Dataset,
        store_folder: Path,
        store: FeatureStore,
        image_keys: Keys,
        batch_size: int,
        console: Console | None,
    ) -> None:
        self._extractor = extractor
        self._dataset = dataset
        self._folder = store_folder
        self._store = store
        self._image_keys = image_keys
        self._batch_size = batch_size
        self._console = console
        self._shard = _Shard()

    def run(self, indices: NDArray[np.int64]) -> None:
        """Extract these images."""
        decoded = self._decoded(indices, _BATCHES_AHEAD * self._batch_size)
        with progress_bars(self._console) as progress:
            num_known = len(self._dataset.images) - len(indices)
            title = f"features of {self._dataset.name}"
            task = progress.add_task(title, total=len(self._dataset.images), completed=num_known)
            while batch := list(islice(decoded, self._batch_size)):
                self._add(batch)
                if self._shard.is_full:
                    self._write()
                progress.advance(task, len(batch))
        self._write()

    def _add(self, batch: list[_Decoded]) -> None:
        for each in batch:
            if each.problem is not None:
                self._shard.unreadable[int(self._image_keys[each.index])] = each.problem
        known = [each for each in batch if each.position >= 0]
        if known:  # a file that was only touched or moved
            self._shard.add(self._keys(known), *self._store.rows_at(np.array([each.position for each in known])))
        new = [each for each in batch if each.pixels is not None]
        if new:
            pixels = np.stack([each.pixels for each in new if each.pixels is not None])
            self._shard.add(self._keys(new), *self._run_tower([each.index for each in new], pixels))

    def _keys(self, batch: list[_Decoded]) -> Keys:
        return np.array([(self._image_keys[each.index], each.content_key) for each in batch], np.uint64)

    def _run_tower(self, indices: list[int], pixels: NDArray[np.uint8]) -> tuple[Half, Half]:
        with torch.inference_mode():
            tokens, pooled = (part.float().cpu().numpy() for part in self._extractor.run(torch.from_numpy(pixels)))
        with np.errstate(over="ignore"):  # checked below
            stored = tokens.astype(np.float16), pooled.astype(np.float16)
        is_finite = np.isfinite(stored[0]).all(axis=(1, 2)) & np.isfinite(stored[1]).all(axis=1)
        if not is_finite.all():
            first = int(np.flatnonzero(~is_finite)[0])
            name = self._dataset.images[indices[first]].image_id
            if np.isfinite(tokens[first]).all() and np.isfinite(pooled[first]).all():
                raise FeaturesError(f"the features of image {name} are too large for float16: choose another tower")
            raise FeaturesError(f"the features of image {name} are not finite: the tower's weights are damaged")
        return stored

    def _write(self) -> None:
        self._shard.write(self._folder)
        self._shard = _Shard()

    def _decoded(self, indices: NDArray[np.int64], num_ahead: int) -> Iterator[_Decoded]:
        with ThreadPoolExecutor(DECODING_THREADS, "decode") as pool:
            rest = iter(indices.tolist())
            waiting = deque(pool.submit(self._decode, index) for index in islice(rest, num_ahead))
            try:
                while waiting:
                    yield waiting.popleft().result()
                    waiting.extend(pool.submit(self._decode, index) for index in islice(rest, 1))
            finally:
                for future in waiting:
                    future.cancel()

    def _decode(self, index: int) -> _Decoded:
        try:
            content_key = key_of(self._dataset.content_key(index))
            position = int(self._store.positions_of_content(np.array([content_key], np.uint64))[0])
            if position >= 0:
                return _Decoded(index, content_key, position=position)
            pixels = self._dataset.pixels(index, self._extractor.image_size, self._extractor.resample)
            return _Decoded(index, content_key, pixels=pixels)
        except FileUnreadable as error:
            return _Decoded(index, 0, problem=Unreadable(str(error), is_temporary=True))
        except ImageError as error:
            return _Decoded(index, 0, problem=Unreadable(str(error)))
        except OSError as error:
            cause = f"the file cannot be read: {error.strerror or error}"
            return _Decoded(index, 0, problem=Unreadable(cause, is_temporary=True))


class _Shard:
    """Rows that are not yet written."""

    def __init__(self) -> None:
        self.unreadable: dict[int, Unreadable] = {}
        self._keys: list[Keys] = []
        self._tokens: list[Half] = []
        self._pooled: list[Half] = []

    def add(self, keys: Keys, tokens: Half, pooled: Half) -> None:
        """Add rows: keys (n, 2), patch tokens (n, S, D) and pooled embeddings (n, E)."""
        self._keys.append(keys)
        self._tokens.append(tokens)
        self._pooled.append(pooled)

    @property
    def is_full(self) -> bool:
        """Whether the shard has reached its limits."""
        num_bytes = sum(each.nbytes for each in (*self._tokens, *self._pooled))
        num_rows = sum(map(len, self._keys)) + len(self.unreadable)
        return num_bytes >= _MAX_SHARD_BYTES or num_rows >= _MAX_SHARD_ROWS

    def write(self, store_folder: Path) -> None:
        """Write the rows, if there are any."""
        if self._keys:
            tokens, pooled = np.concatenate(self._tokens), np.concatenate(self._pooled)
            write_shard(store_folder, np.concatenate(self._keys), tokens, pooled, self.unreadable)
        elif self.unreadable:
            write_shard(store_folder, np.empty((0, 2), np.uint64), None, None, self.unreadable)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file, which ends with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
