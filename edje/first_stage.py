"""A first stage of one's own: texts and images as single vectors, compared by their cosine.

Stands in for CLIP, SigLIP or a vector database where there is none: it fetches the candidates that the joint encoder
ranks anew. An image's vector is a linear map of the tower's pooled embedding. A text's is either a weighted sum of word
vectors (`num_layers` 0, what `edje.cca` fits in closed form) or the mean over a small encoder's tokens (trained).
Two texts of the same words in another order differ for the second kind only; no single vector says much about which
attribute belongs to which object, and that is what reranking is for.

A folder `first_stage` in a checkpoint: config.json and model.safetensors. It has no part in the model digest, because
neither tokens nor logits depend on it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointMissing, CheckpointTampered
from edje.config import Count, JointConfig
from edje.joint import JointBlock, table, visible

FOLDER, _CONFIG, _WEIGHTS = "first_stage", "config.json", "model.safetensors"
#: Of the cosine at the start of training, as in CLIP.
INITIAL_SCALE = 14.3
NUM_SPECIAL = 2  # [CLS] and [SEP] around a caption


@dataclass(frozen=True, slots=True)
class FirstStageModelConfig:
    """`dim` is the width of the embeddings that are compared, `text_dim` that of the words."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    dim: Count
    vocab_size: Count
    image_dim: Count
    text_dim: Count
    num_layers: Annotated[int, Field(ge=0)] = 0
    num_heads: Count = 4
    max_positions: Count = 64
    image_power: Annotated[float, Field(gt=0)] = 1.0  # tames the large values of a tower that ends in a ReLU

    def __post_init__(self) -> None:
        if self.text_dim % self.num_heads:
            raise ValueError(f"a width of {self.text_dim} does not divide into {self.num_heads} heads")


class FirstStageModel(nn.Module):
    """Both sides of the comparison; embeddings have unit length."""

    def __init__(self, config: FirstStageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.words = table(config.vocab_size, config.text_dim)
        self.word_weights = nn.Parameter(torch.ones(config.vocab_size), requires_grad=config.num_layers > 0)
        self.positions = table(config.max_positions, config.text_dim) if config.num_layers else None
        blocks = JointConfig(
            dim=config.text_dim,
            num_layers=max(1, config.num_layers),
            num_heads=config.num_heads,
            hidden_dim=4 * config.text_dim,
            vocab_size=config.vocab_size,
            sep_id=0,
        )
        self.layers = nn.ModuleList(JointBlock(blocks) for _ in range(config.num_layers))
        self.text_out = nn.Linear(config.text_dim, config.dim)
        self.image_out = nn.Linear(config.image_dim, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def embed_texts(self, text_ids: Tensor, text_lengths: Tensor) -> Tensor:  # (Q, T), (Q,) -> (Q, e)
        """Captions with [CLS] and [SEP], padded on the right with any token."""
        num_text = text_ids.shape[1]
        is_text = torch.arange(num_text, device=text_ids.device) < text_lengths[:, None]
        if self.positions is None:
            return functional.normalize(self.text_out(self._bag(text_ids, is_text)), dim=-1)
        mask = visible(text_lengths, num_text, 0)
        hidden = self.words(text_ids) + self.positions.weight[:num_text]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        mean = (hidden * is_text[..., None]).sum(dim=1) / text_lengths[:, None]
        return functional.normalize(self.text_out(mean), dim=-1)

    def embed_images(self, pooled: Tensor) -> Tensor:  # (N, E) -> (N, e)
        power = self.config.image_power
        tamed = pooled if power == 1.0 else pooled.sign() * pooled.abs() ** power
        return functional.normalize(self.image_out(tamed.to(self.image_out.weight.dtype)), dim=-1)

    def _bag(self, text_ids: Tensor, is_text: Tensor) -> Tensor:
        """Each word once, weighted, the weights of unit length: (Q, T) -> (Q, d)."""
        ordered, order = text_ids.masked_fill(~is_text, -1).sort(dim=1)
        is_new = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered >= 0)
        weights = self.word_weights[ordered.clamp(min=0)] * is_new
        weights = functional.normalize(weights, dim=1)
        return (weights[..., None] * self.words(ordered.clamp(min=0))).sum(dim=1)


@torch.no_grad()
def draw_first_stage(model: FirstStageModel, seed: int) -> None:
    """Weights to begin training from."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name == "log_scale":
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            is_table = name in ("words.weight", "positions.weight")
            parameter.normal_(0.0, 0.02 if is_table else parameter.shape[1] ** -0.5, generator=generator)


def save_first_stage(checkpoint: Path, model: FirstStageModel) -> None:
    """Write `first_stage/` into a checkpoint folder that does not have one yet."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    data = safetensors.torch.save({name: each.detach().cpu().contiguous() for name, each in model.state_dict().items()})
    (folder / _WEIGHTS).write_bytes(data)
    envelope = {"config": asdict(model.config), "weights_sha256": hashlib.sha256(data).hexdigest()}
    (folder / _CONFIG).write_text(json.dumps(envelope, indent=2) + "\n", encoding="utf-8")


def load_first_stage(checkpoint: Path) -> FirstStageModel:
    """The first stage of a checkpoint. Raises `CheckpointError`."""
    folder = checkpoint / FOLDER
    if not (folder / _CONFIG).is_file():
        raise CheckpointMissing(f"{checkpoint} has no first stage: training writes one into the folder {FOLDER!r}")
    try:
        envelope = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        config = TypeAdapter(FirstStageModelConfig).validate_json(json.dumps(envelope["config"]))
        data = (folder / _WEIGHTS).read_bytes()
    except ValidationError as error:
        raise CheckpointMismatch(f"{folder / _CONFIG} describes no first stage this program knows: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointIncomplete(f"{folder} cannot be read ({error}): copy the whole folder again") from error
    if hashlib.sha256(data).hexdigest() != envelope.get("weights_sha256"):
        raise CheckpointTampered(f"{folder / _WEIGHTS} is not the file that was saved: copy the whole folder again")
    with torch.device("meta"):
        model = FirstStageModel(config)
    try:
        model.load_state_dict(safetensors.torch.load(data), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointMismatch(f"{folder} holds weights of another first stage: {error}") from error
    return model.eval().requires_grad_(False)
