"""First stages of the hub: the text encoder of SigLIP, SigLIP 2 or CLIP, for the vision tower of the same model.

The image vector is the tower's pooled embedding (SigLIP) or a linear map of it (CLIP). The text vector comes from the
model's text encoder and tokenizer. The checkpoint holds both, so that nothing is fetched from the hub again; for
SigLIP 2 Large they take 2.3 GB, which the service never reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from torch import nn
from torch.nn import functional

from edje.checkpoint import CheckpointIncomplete, CheckpointMismatch, CheckpointTampered
from edje.first_stage.base import FirstStageEncoder, Vectors, load_weights, parse_config, write_folder
from edje.imports.sources import HUB_PREFIX, SourceError
from edje.optional import PackageMissing, require_package
from edje.text import canonical_caption
from edje.tower_config import Count

_TOKENIZER = "tokenizer"
_CHUNK = 64
#: The library's classes of a text encoder and of its configuration. SigLIP 2 at a fixed resolution is a `siglip`.
_CLASSES = {"siglip": ("SiglipTextConfig", "SiglipTextModel"), "clip": ("CLIPTextConfig", "CLIPTextModel")}


#: Changes to a caption before the model's tokenizer reads it; "canonical" is lower case without punctuation.
TextPreparation = Literal["as_written", "lower_case", "canonical"]


def published_preparation(tokenizer: Any) -> TextPreparation:
    """The preparation that the model was trained with, from its published tokenizer configuration.

    `do_lower_case` decides where it is given. SigLIP, SigLIP 2 and CLIP were all trained on lower case, so that is the
    default: SigLIP 2 is published with Gemma's tokenizer, which keeps capitals (R@1 on Flickr30k 73.7 instead of 80.7,
    github.com/google-research/big_vision issue 166). Only SigLIP 1 was trained without punctuation.
    """
    settings = tokenizer.init_kwargs
    if settings.get("do_lower_case") is False:
        return "as_written"
    name = settings.get("tokenizer_class") or type(tokenizer).__name__
    return "canonical" if name.removesuffix("Fast") == "SiglipTokenizer" else "lower_case"


def _prepared(caption: str, preparation: TextPreparation) -> str:
    if preparation == "canonical":
        return canonical_caption(caption)
    return caption.lower() if preparation == "lower_case" else caption


@dataclass(frozen=True, slots=True)
class HubFirstStageConfig:
    """The text encoder; `source` is its name on the hub or its folder, for information only."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    source: str
    architecture: Literal["siglip", "clip"]
    dim: Count
    image_dim: Count
    text_config: dict[str, Any]  # the library's configuration
    text_preparation: TextPreparation


class HubFirstStage(FirstStageEncoder):
    """A text encoder of the transformers library, and for CLIP the linear maps to the common space."""

    def __init__(self, config: HubFirstStageConfig, tokenizer: Any) -> None:
        super().__init__()
        transformers = require_package("transformers", "train")
        config_class, model_class = (getattr(transformers, name) for name in _CLASSES[config.architecture])
        self.config = config
        text_config = config_class.from_dict(config.text_config)
        self.text = model_class(text_config)
        has_maps = config.architecture == "clip"  # SigLIP's encoders end in the common space
        self.text_out = nn.Linear(text_config.hidden_size, config.dim, bias=False) if has_maps else nn.Identity()
        self.image_out = nn.Linear(config.image_dim, config.dim, bias=False) if has_maps else nn.Identity()
        self._tokenizer = tokenizer
        # SigLIP pools the last position and was trained on padded texts; CLIP pools the end-of-text token.
        self._padding = True if has_maps else "max_length"
        self._max_tokens = int(text_config.max_position_embeddings)

    @property
    def dim(self) -> int:
        return self.config.dim

    def _device(self) -> torch.device:
        device: torch.device = next(self.text.parameters()).device
        return device

    @torch.inference_mode()
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """See `FirstStageEncoder`; reads the text."""
        vectors = np.empty((len(captions), self.dim), np.float32)
        for start in range(0, len(captions), _CHUNK):
            inputs = self._tokenizer(
                [_prepared(each, self.config.text_preparation) for each in captions[start : start + _CHUNK]],
                padding=self._padding,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            pooled = self.text(**inputs.to(self._device())).pooler_output
            vectors[start : start + _CHUNK] = functional.normalize(self.text_out(pooled).float(), dim=-1).cpu()
        return vectors

    @torch.inference_mode()
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """See `FirstStageEncoder`."""
        vectors = np.empty((len(pooled), self.dim), np.float32)
        for start in range(0, len(pooled), _CHUNK):
            chunk = torch.from_numpy(np.array(pooled[start : start + _CHUNK], np.float32)).to(self._device())
            vectors[start : start + _CHUNK] = functional.normalize(self.image_out(chunk).float(), dim=-1).cpu()
        return vectors

    def save(self, folder: Path) -> None:
        """Write the tokenizer, the weights and, last, config.json."""
        self._tokenizer.save_pretrained(folder / _TOKENIZER)
        fields = {"kind": "hub", "config": asdict(self.config), "tokenizer_sha256": _file_digests(folder / _TOKENIZER)}
        write_folder(folder, fields, self.state_dict())


def load_published_first_stage(source: str) -> HubFirstStage:
    """Load the text encoder, and CLIP's maps, from the hub or a local folder. Raises `SourceError`."""
    transformers = require_package("transformers", "train")
    name = source.removeprefix(HUB_PREFIX)
    try:
        whole = transformers.AutoConfig.from_pretrained(name)
        if whole.model_type not in _CLASSES:
            raise SourceError(
                f"{name} is a {whole.model_type}: a first stage of kind 'hub' is one of {', '.join(_CLASSES)}, "
                "with a text encoder"
            )
        # Safetensors because a pickle can run code; float32 because our checkpoints store it.
        model = transformers.AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except SourceError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(
            f"the text encoder of {name} cannot be loaded ({' '.join(str(error).split())[:300]}): where the hub cannot "
            "be reached, give a local folder with config.json, model.safetensors and the tokenizer's files"
        ) from error
    is_clip = whole.model_type == "clip"
    config = HubFirstStageConfig(
        source=source,
        architecture=whole.model_type,
        dim=int(whole.projection_dim if is_clip else model.text_model.config.projection_size),
        image_dim=int(whole.vision_config.hidden_size),
        text_config=json.loads(json.dumps(model.text_model.config.to_dict())),  # keys as text, as in a file
        text_preparation=published_preparation(tokenizer),
    )
    with torch.device("meta"):
        encoder = HubFirstStage(config, tokenizer)
    encoder.text = model.text_model
    if is_clip:
        encoder.text_out, encoder.image_out = model.text_projection, model.visual_projection
    return encoder.eval().requires_grad_(False)


def load_hub_first_stage(folder: Path, fields: dict[str, Any], data: bytes) -> HubFirstStage:
    """The encoder that `HubFirstStage.save` wrote. Raises `CheckpointError`."""
    config = parse_config(folder, HubFirstStageConfig, fields.get("config"))
    if _file_digests(folder / _TOKENIZER) != fields.get("tokenizer_sha256"):
        raise CheckpointTampered(f"{folder / _TOKENIZER} is not as it was saved: copy the whole folder again")
    try:
        tokenizer = require_package("transformers", "train").AutoTokenizer.from_pretrained(folder / _TOKENIZER)
        # Not on the meta device: the library has buffers, such as position numbers, that no file stores.
        encoder = HubFirstStage(config, tokenizer)
    except PackageMissing as error:
        raise CheckpointMismatch(f"{folder} cannot be loaded here: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointIncomplete(f"{folder} cannot be loaded: {error}: copy the whole folder again") from error
    return load_weights(folder, encoder, data)


def _file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file by file name."""
    try:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    except OSError as error:
        raise CheckpointIncomplete(f"{folder} cannot be read ({error}): copy the whole folder again") from error
