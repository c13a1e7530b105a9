"""Loads a vision tower by name, with its weights: from the hub, from the timm library, or from an ONNX file.

    hub:NAME   a SigLIP, SigLIP 2 or CLIP model that transformers can load: a name on the hub, or a local folder
    timm:NAME  a model of the timm library
    onnx:PATH  a graph with an output `tokens`

The result includes a configuration, so that a checkpoint made of it needs neither the hub nor the file again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edje.config import PreprocessConfig
from edje.optional import require_package
from edje.tower_config import OnnxVisionConfig, TimmVisionConfig, VisionConfig
from edje.towers.base import TowerError
from edje.towers.build import build_tower
from edje.towers.hub_tower import read_published_tower
from edje.towers.onnx_tower import OnnxRunner
from edje.towers.timm_tower import library_model, patch_tokens

#: Width of the adapter's attention heads where the tower has no heads.
_HEAD_DIM = 64
#: Pillow's numbers of the filters, as published preprocessor configurations give them.
_RESAMPLE: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, slots=True)
class LoadedTower:
    """A tower, its configuration, and the preprocessing that it was trained with."""

    config: VisionConfig
    preprocess: PreprocessConfig
    module: nn.Module


def load_tower(source: str, *, image_size: int | None = None, is_pretrained: bool = True) -> LoadedTower:
    """Load the tower of this name for square images of `image_size`, by default the size it was trained on.

    Without `is_pretrained` the library draws the weights from torch's global seed. Raises `TowerError`, and
    `PackageMissing` where the library is not installed.
    """
    kind, _, name = source.partition(":")
    if kind == "hub" and name:
        return _from_hub(name, image_size, is_pretrained)
    if kind == "timm" and name:
        return _from_timm(name, image_size, is_pretrained)
    if kind == "onnx" and name:
        return _from_onnx(Path(name), image_size)
    raise TowerError(f"{source!r} names no tower: write hub:NAME, timm:NAME or onnx:PATH")


def _from_hub(name: str, image_size: int | None, is_pretrained: bool) -> LoadedTower:
    published = read_published_tower(name, is_pretrained=is_pretrained)
    if image_size not in (None, published.image_size):
        raise TowerError(
            f"{name} takes images of {published.image_size} pixels, not {image_size}: leave the image size out "
            "(the tower has one learned vector for each position of that size)"
        )
    tower = build_tower(published.config, published.image_size)
    if published.weights is not None:
        tower.get_submodule("model").load_state_dict(published.weights)
    pixels, half = published.preprocessor, (0.5, 0.5, 0.5)
    preprocess = PreprocessConfig(
        image_size=published.image_size,
        mean=_channels(pixels.get("image_mean", half)),
        std=_channels(pixels.get("image_std", half)),
        resample=_RESAMPLE.get(pixels.get("resample", 2), "bicubic"),
    )
    return LoadedTower(published.config, preprocess, tower)


def _from_timm(name: str, image_size: int | None, is_pretrained: bool) -> LoadedTower:
    timm = require_package("timm", "train")
    if not timm.is_model(name.partition(".")[0]):
        raise TowerError(f"timm {timm.__version__} has no model {name!r}: timm.list_models() lists its models")
    published = timm.get_pretrained_cfg(name).to_dict()
    size = image_size or int(published["input_size"][-1])
    try:
        model = library_model(name, size, is_pretrained=is_pretrained)
    except (OSError, RuntimeError) as error:
        raise TowerError(
            f"timm cannot load {name!r}: {str(error)[:300].rstrip('.')}. Without a network, set the tower to a file "
            "(onnx:PATH), or copy the cache of the Hugging Face hub from a machine that has the weights"
        ) from error
    with torch.inference_mode():
        tokens, pooled = patch_tokens(model, torch.zeros(1, 3, size, size))
    config = TimmVisionConfig(
        model_name=name.partition(".")[0],  # the part after the dot names weights; the checkpoint stores those
        dim=tokens.shape[2],
        tokens_per_image=tokens.shape[1],
        pooled_dim=pooled.shape[1],
        num_heads=_num_heads(tokens.shape[2]),
    )
    tower = build_tower(config, size)
    tower.get_submodule("model").load_state_dict(model.state_dict())
    preprocess = PreprocessConfig(
        image_size=size,
        mean=_channels(published["mean"]),
        std=_channels(published["std"]),
        resample="bilinear" if published["interpolation"] == "bilinear" else "bicubic",
    )
    return LoadedTower(config, preprocess, tower)


def _from_onnx(path: Path, image_size: int | None) -> LoadedTower:
    """Assumes pixels from -1 to 1, because a graph does not say which preprocessing it was trained with."""
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise TowerError(f"the ONNX graph {path} cannot be read: {error.strerror}") from error
    run = OnnxRunner(graph)
    size = image_size or run.image_size
    if size is None:
        raise TowerError(f"{path} takes images of any size: give one (image_size)")
    tokens, pooled = run(torch.zeros(1, 3, size, size))
    config = OnnxVisionConfig(
        dim=tokens.shape[2],
        tokens_per_image=tokens.shape[1],
        pooled_dim=pooled.shape[1],
        num_heads=_num_heads(tokens.shape[2]),
    )
    return LoadedTower(config, PreprocessConfig(image_size=size), build_tower(config, size, graph))


def _num_heads(dim: int) -> int:
    return dim // _HEAD_DIM if dim % _HEAD_DIM == 0 else math.gcd(dim, 8)


def _channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
