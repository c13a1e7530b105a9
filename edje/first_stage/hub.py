"""The first stage that a published tower belongs to: SigLIP, SigLIP 2 or CLIP, its text encoder beside our tower.

An image's vector is made of what the tower pools anyway (SigLIP compares just that, CLIP maps it once more), a text's
by the model's own text encoder and tokenizer. Both lie in the checkpoint, so that it can be judged where there is no
hub and means the same when a name on the hub means something else one day; that is 2.3 GB for SigLIP 2 Large, which
the service never reads.

Captions are made canonical before the model's own tokenizer sees them: it is what the joint encoder was trained on, and
not every published tokenizer lower-cases by itself what its model expects in lower case.
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
from edje.first_stage.dual_encoder import FirstStage, Vectors, parse_described, take_weights, write_folder
from edje.imports.sources import HUB_PREFIX, SourceError
from edje.optional import PackageMissing, need
from edje.text import canonical_caption
from edje.tower_config import Count

_TOKENIZER = "tokenizer"
_CHUNK = 64
#: The library's classes of a text encoder and its configuration. SigLIP 2 at a fixed resolution calls itself `siglip`.
_CLASSES = {"siglip": ("SiglipTextConfig", "SiglipTextModel"), "clip": ("CLIPTextConfig", "CLIPTextModel")}


@dataclass(frozen=True, slots=True)
class HubFirstStageConfig:
    """`source` says where it came from; nothing is fetched from there again."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    source: str
    architecture: Literal["siglip", "clip"]
    dim: Count
    image_dim: Count
    text_config: dict[str, Any]  # the library's own
    canonical_captions: bool = True


class HubFirstStage(FirstStage):
    """A text encoder of the transformers library, and the maps into the space in which both sides are compared."""

    def __init__(self, config: HubFirstStageConfig, tokenizer: Any) -> None:
        super().__init__()
        transformers = need("transformers", "train")
        config_class, model_class = (getattr(transformers, name) for name in _CLASSES[config.architecture])
        self.config = config
        text_config = config_class.from_dict(config.text_config)
        self.text = model_class(text_config)
        maps = config.architecture == "clip"  # SigLIP's two encoders end in the same space
        self.text_out = nn.Linear(text_config.hidden_size, config.dim, bias=False) if maps else nn.Identity()
        self.image_out = nn.Linear(config.image_dim, config.dim, bias=False) if maps else nn.Identity()
        self._tokenizer = tokenizer
        # SigLIP reads a text's last place and was trained on padded ones; CLIP reads the place where the text ends.
        self._padding = True if maps else "max_length"
        self._max_tokens = int(text_config.max_position_embeddings)

    @property
    def dim(self) -> int:
        return self.config.dim

    def _device(self) -> torch.device:
        device: torch.device = next(self.text.parameters()).device
        return device

    @torch.inference_mode()
    def caption_vectors(self, captions: Sequence[str], text_ids: Sequence[Sequence[int]]) -> Vectors:
        """See `FirstStage`; the captions are read as they were written."""
        vectors = np.empty((len(captions), self.dim), np.float32)
        for start in range(0, len(captions), _CHUNK):
            some = list(captions[start : start + _CHUNK])
            read = self._tokenizer(
                [canonical_caption(each) for each in some] if self.config.canonical_captions else some,
                padding=self._padding,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            pooled = self.text(**read.to(self._device())).pooler_output
            vectors[start : start + _CHUNK] = functional.normalize(self.text_out(pooled).float(), dim=-1).cpu()
        return vectors

    @torch.inference_mode()
    def image_vectors(self, pooled: NDArray[np.floating]) -> Vectors:
        """See `FirstStage`."""
        vectors = np.empty((len(pooled), self.dim), np.float32)
        for start in range(0, len(pooled), _CHUNK):
            some = torch.from_numpy(np.array(pooled[start : start + _CHUNK], np.float32)).to(self._device())
            vectors[start : start + _CHUNK] = functional.normalize(self.image_out(some).float(), dim=-1).cpu()
        return vectors

    def save(self, folder: Path) -> None:
        """Weights, tokenizer and, last, what describes them, into an empty folder."""
        self._tokenizer.save_pretrained(folder / _TOKENIZER)
        envelope = {"kind": "hub", "config": asdict(self.config), "tokenizer_sha256": _digests(folder / _TOKENIZER)}
        write_folder(folder, envelope, self.state_dict())


def published_first_stage(source: str, *, canonical_captions: bool = True) -> HubFirstStage:
    """The pair of encoders of this name, on the hub or in a local folder. Raises `SourceError`.

    Of the images' side only what follows the tower is taken.
    """
    transformers = need("transformers", "train")
    name = source.removeprefix(HUB_PREFIX)
    try:
        whole = transformers.AutoConfig.from_pretrained(name)
        if whole.model_type not in _CLASSES:
            raise SourceError(
                f"{name} is a {whole.model_type}: a first stage of kind 'hub' is one of {', '.join(_CLASSES)}, "
                "with a text encoder"
            )
        # Never a pickle, and the type that our own checkpoints keep.
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
        text_config=json.loads(json.dumps(model.text_model.config.to_dict())),  # keys as a file would have them
        canonical_captions=canonical_captions,
    )
    with torch.device("meta"):
        ours = HubFirstStage(config, tokenizer)
    ours.text = model.text_model
    if is_clip:
        ours.text_out, ours.image_out = model.text_projection, model.visual_projection
    return ours.eval().requires_grad_(False)


def load_hub_first_stage(folder: Path, envelope: dict[str, Any], data: bytes) -> HubFirstStage:
    """What `HubFirstStage.save` wrote. Raises `CheckpointError`."""
    config = parse_described(folder, HubFirstStageConfig, envelope.get("config"))
    if _digests(folder / _TOKENIZER) != envelope.get("tokenizer_sha256"):
        raise CheckpointTampered(f"{folder / _TOKENIZER} is not as it was saved: copy the whole folder again")
    try:
        tokenizer = need("transformers", "train").AutoTokenizer.from_pretrained(folder / _TOKENIZER)
        # On the CPU: the library keeps position numbers and the like in buffers that no file stores.
        model = HubFirstStage(config, tokenizer)
    except PackageMissing as error:
        raise CheckpointMismatch(f"{folder} cannot be loaded here: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointIncomplete(f"{folder} cannot be loaded: {error}: copy the whole folder again") from error
    return take_weights(folder, model, data)


def _digests(folder: Path) -> dict[str, str]:
    """Digest by file name."""
    try:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    except OSError as error:
        raise CheckpointIncomplete(f"{folder} cannot be read ({error}): copy the whole folder again") from error
