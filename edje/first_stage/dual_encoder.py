"""A first stage of one's own: texts and images as single vectors, compared by their cosine.

Stands in for CLIP, SigLIP or a vector database where there is none: it fetches the candidates that the joint encoder
ranks anew. An image's vector is a linear map of the tower's pooled embedding. A text's is either a weighted sum of word
vectors (`num_layers` 0, fitted in closed form by `edje.first_stage.cca`) or the mean of a small encoder's tokens.
Two texts of the same words in another order differ for the second kind only; no single vector says much about which
attribute belongs to which object, and that is what reranking is for.

A folder `first_stage` in a checkpoint: config.json and model.safetensors. It has no part in the model digest, because
neither tokens nor logits depend on it. A first stage that was published together with the tower lies in the same
folder, and is `edje.first_stage.hub`.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointMissing, CheckpointTampered
from edje.config import JointConfig
from edje.layers import table
from edje.model.joint import JointBlock, visible
from edje.tower_config import Count
from protocols.validation import first_problem

FOLDER, _CONFIG, _WEIGHTS = "first_stage", "config.json", "model.safetensors"
#: Of the cosine at the start of training, as in CLIP.
INITIAL_SCALE = 14.3
#: Captions or images that are embedded at a time.
_CHUNK = 1024

Vectors = NDArray[np.float32]
_Described = TypeVar("_Described")
_Module = TypeVar("_Module", bound=nn.Module)


class FirstStage(nn.Module, ABC):
    """What fetches the candidates: captions and images as vectors of unit length, compared by their product."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The width e of these vectors."""

    @abstractmethod
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """(C, e). A caption comes as it was written and as the joint encoder's ids; a kind reads the one it knows."""

    @abstractmethod
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """(N, E) pooled embeddings of the tower -> (N, e)."""


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


class FirstStageModel(FirstStage):
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

    @property
    def dim(self) -> int:
        return self.config.dim

    @torch.inference_mode()
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """See `FirstStage`; the ids are read."""
        vectors = np.empty((len(text_ids), self.dim), np.float32)
        lengths = torch.tensor([len(ids) for ids in text_ids])
        by_length = lengths.argsort(stable=True)
        for start in range(0, len(text_ids), _CHUNK):
            some = by_length[start : start + _CHUNK]
            padded = torch.zeros(len(some), int(lengths[some].max()), dtype=torch.long)
            for row, caption in zip(padded, some.tolist(), strict=True):
                row[: lengths[caption]] = torch.tensor(text_ids[caption])
            device = self.image_out.weight.device
            vectors[some.numpy()] = self.embed_texts(padded.to(device), lengths[some].to(device)).float().cpu().numpy()
        return vectors

    @torch.inference_mode()
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """See `FirstStage`."""
        vectors = np.empty((len(pooled), self.dim), np.float32)
        for start in range(0, len(pooled), _CHUNK):
            some = torch.from_numpy(np.array(pooled[start : start + _CHUNK], np.float32))
            vectors[start : start + _CHUNK] = self.embed_images(some.to(self.image_out.weight.device)).float().cpu()
        return vectors

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
        ordered, _ = text_ids.masked_fill(~is_text, -1).sort(dim=1)
        is_new = functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True) & (ordered >= 0)
        weights = self.word_weights[ordered.clamp(min=0)] * is_new
        weights = functional.normalize(weights, dim=1)
        summed: Tensor = (weights[..., None] * self.words(ordered.clamp(min=0))).sum(dim=1)
        return summed


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


def save_first_stage(checkpoint: Path, model: FirstStage) -> None:
    """Write `first_stage/` into a checkpoint folder that does not have one yet."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    if not isinstance(model, FirstStageModel):
        from edje.first_stage.hub import HubFirstStage

        assert isinstance(model, HubFirstStage)  # there is no third kind
        model.save(folder)
        return
    write_folder(folder, {"kind": "own", "config": asdict(model.config)}, model.state_dict())


def load_first_stage(checkpoint: Path) -> FirstStage:
    """The first stage of a checkpoint, on the CPU. Raises `CheckpointError`."""
    folder = checkpoint / FOLDER
    if not (folder / _CONFIG).is_file():
        raise CheckpointMissing(f"{checkpoint} has no first stage: training writes one into the folder {FOLDER!r}")
    envelope, data = read_folder(folder)
    if envelope.get("kind", "own") == "hub":
        from edje.first_stage.hub import load_hub_first_stage

        return load_hub_first_stage(folder, envelope, data)
    config = parse_described(folder, FirstStageModelConfig, envelope.get("config"))
    with torch.device("meta"):
        model = FirstStageModel(config)
    return take_weights(folder, model, data)


# What the folders of both kinds have in common


def write_folder(folder: Path, envelope: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The two files; the envelope comes last, with the digest of the other."""
    data = safetensors.torch.save({name: each.detach().cpu().contiguous() for name, each in tensors.items()})
    (folder / _WEIGHTS).write_bytes(data)
    whole = envelope | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    (folder / _CONFIG).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The envelope and the weights' file, which is the one that was saved. Raises `CheckpointError`."""
    try:
        envelope = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        data = (folder / _WEIGHTS).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointIncomplete(f"{folder} cannot be read ({error}): copy the whole folder again") from error
    if not isinstance(envelope, dict):
        raise CheckpointMismatch(f"{folder / _CONFIG} describes no first stage")
    if hashlib.sha256(data).hexdigest() != envelope.get("weights_sha256"):
        raise CheckpointTampered(f"{folder / _WEIGHTS} is not the file that was saved: copy the whole folder again")
    return envelope, data


def parse_described(folder: Path, kind: type[_Described], described: object) -> _Described:
    """A configuration as the envelope has it. Raises `CheckpointMismatch`."""
    try:
        parsed: _Described = TypeAdapter(kind).validate_json(json.dumps(described))
    except ValidationError as error:
        raise CheckpointMismatch(
            f"{folder / _CONFIG} describes no first stage this program knows: {first_problem(error, root='config')}"
        ) from error
    return parsed


def take_weights(folder: Path, model: _Module, data: bytes) -> _Module:
    """The model with the weights of the file, frozen. Raises `CheckpointMismatch`."""
    try:
        model.load_state_dict(safetensors.torch.load(data), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointMismatch(f"{folder} holds weights of another first stage: {error}") from error
    return model.eval().requires_grad_(False)
