"""Edje: vision tower, adapter and joint encoder in one module.

Takes tensors only: text as ids, images as pixels. Tokenising and decoding happen elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje.config import EdjeConfig, PreprocessConfig
from edje.model.adapter import Adapter, build_adapter
from edje.model.joint import JointEncoder
from edje.model.late_fusion import LateFusionEncoder
from edje.towers.base import input_dtype
from edje.towers.build import build_tower


class Edje(nn.Module):
    """The reranker: `encode_images` runs once per image, `encode_queries` once per query, `score` once per pair."""

    def __init__(
        self,
        vision: nn.Module,
        adapter: Adapter,
        joint: JointEncoder | LateFusionEncoder,
        preprocess: PreprocessConfig,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.adapter = adapter
        self.joint = joint
        # (byte / 255 - mean) / std as one multiply-add per channel.
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (preprocess.mean, preprocess.std))
        self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        self.register_buffer("pixel_shift", -mean / std, persistent=False)
        self.pixel_scale: Tensor
        self.pixel_shift: Tensor

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (B, 3, H, W) -> (B, m, d), (B, E)
        """The visual tokens to store, and the tower's pooled embedding."""
        patches, pooled = self.run_tower(pixels)
        return self.encode_patches(patches), pooled

    def run_tower(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (B, 3, H, W) -> (B, S, D), (B, E)
        """Patch tokens and pooled embedding of the vision tower."""
        return self.vision(self.normalise(pixels).to(input_dtype(self.vision)))  # type: ignore[no-any-return]

    def normalise(self, pixels: Tensor) -> Tensor:  # uint8 (B, 3, H, W) -> (B, 3, H, W)
        """Pixels with the mean and standard deviation of the tower's training data."""
        return pixels.to(self.pixel_scale.dtype) * self.pixel_scale + self.pixel_shift

    def encode_patches(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, m, d)
        """The visual tokens to store, from the tower's patch tokens."""
        return self.joint.encode_visual(self.adapter(patches.to(input_dtype(self.adapter))))

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """The part of the computation that depends on the text alone, (Q, T) -> (Q, T, d).

        `text_lengths` (Q,) are the lengths without padding; None for captions without padding.
        """
        return self.joint.encode_queries(text_ids, text_lengths)

    def score(self, text: Tensor, visual: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """See `JointEncoder.score`."""
        return self.joint.score(text, visual, text_lengths)


def build_edje(config: EdjeConfig, device: str = "cpu", graph: bytes | None = None) -> Edje:
    """The model of this configuration, uninitialised.

    `graph` is the content of the ONNX file, for a tower of kind onnx. On the device "meta" weights take no memory.
    """
    with torch.device(device):
        vision = build_tower(config.vision, config.preprocess.image_size, graph)
        adapter = build_adapter(config.adapter, config.vision, config.num_patches, config.joint)
        joint = (
            LateFusionEncoder(config.joint, config.adapter.num_tokens)
            if config.joint.is_late_fusion
            else JointEncoder(config.joint)
        )
    return Edje(vision, adapter, joint, config.preprocess)
