"""Edje: vision tower, adapter and joint encoder in one module, and how untrained weights are drawn.

Takes tensors only: text is ids, images are bytes of pixels. Tokenising and decoding happen elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edje.config import EdjeConfig, PreprocessConfig
from edje.model.adapter import Adapter, build_adapter
from edje.model.joint import JointEncoder
from edje.model.late_fusion import ApartEncoder
from edje.towers.base import BorrowedTower, build_tower, input_dtype


class Edje(nn.Module):
    """The two halves of the reranker: `encode_images` runs once per image, `score` once per pair."""

    def __init__(
        self,
        vision: nn.Module,
        adapter: Adapter,
        joint: JointEncoder | ApartEncoder,
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

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (B, 3, H, W) -> (B, m, d), (B, D)
        """Visual tokens to store, and the tower's pooled embedding."""
        patches, pooled = self.extract(pixels)
        return self.encode_patches(patches), pooled

    def extract(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # uint8 (B, 3, H, W) -> (B, S, D), (B, E)
        """What the tower sees: patch tokens before the adapter, and the pooled embedding."""
        return self.vision(self.normalise(pixels).to(input_dtype(self.vision)))  # type: ignore[no-any-return]

    def normalise(self, pixels: Tensor) -> Tensor:  # uint8 (B, 3, H, W) -> (B, 3, H, W)
        """What the tower takes."""
        return pixels.to(self.pixel_scale.dtype) * self.pixel_scale + self.pixel_shift

    def encode_patches(self, patches: Tensor) -> Tensor:  # (B, S, D) -> (B, m, d)
        """From the tower's patch tokens, which may have been computed long ago, to the visual tokens to store."""
        return self.joint.encode_visual(self.adapter(patches.to(input_dtype(self.adapter))))

    def encode_queries(self, text_ids: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """(Q, T) -> (Q, T, d): what depends on the text alone. `text_lengths` (Q,) for padded captions."""
        return self.joint.encode_queries(text_ids, text_lengths)

    def score(
        self,
        text: Tensor,
        visual: Tensor,
        text_lengths: Tensor | None = None,
        first_stage: Tensor | None = None,
    ) -> Tensor:
        """See `JointEncoder.score`."""
        return self.joint.score(text, visual, text_lengths, first_stage)


def build_edje(config: EdjeConfig, device: str = "cpu", graph: bytes | None = None) -> Edje:
    """Compose the model of a configuration; the weights are whatever torch leaves there (on "meta", none).

    `graph` is the ONNX file of a tower that is one (see `build_tower`).
    """
    with torch.device(device):
        vision = build_tower(config.vision, config.preprocess.image_size, graph)
        adapter = build_adapter(config.adapter, config.vision, config.num_patches, config.joint)
        joint = (
            ApartEncoder(config.joint, config.adapter.num_tokens) if config.joint.apart else JointEncoder(config.joint)
        )
    return Edje(vision, adapter, joint, config.preprocess)


#: Parameters that are looked up or attended from, not multiplied with.
_TABLES = ("words.weight", "positions.weight", "types.weight", "places.table.weight", "positions", "query", "probe")

#: At 1, attention is nearly uniform and pairs score within 0.1 of each other; at 1.5 they spread over about 1.
_GAIN = 1.5


@torch.no_grad()
def draw_weights(model: Edje, seed: int) -> None:
    """Untrained weights, the same for the same seed, under which scores differ between pairs but mean nothing.

    A matrix is drawn with deviation `_GAIN` / sqrt(inputs), so that signals keep their size from end to end; tables at
    unit size; biases are zero, norms and scales identities. A borrowed tower is drawn as its own library does.
    """
    is_borrowed = isinstance(model.vision, BorrowedTower)
    if isinstance(model.vision, BorrowedTower):
        model.vision.draw(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if is_borrowed and name.startswith("vision."):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim <= 1:
            parameter.fill_(1.0)
        else:
            std = 1.0 if name.endswith(_TABLES) else _GAIN * parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
