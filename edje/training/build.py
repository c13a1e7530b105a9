"""Builds a recipe's model with initial weights and its tokenizer; loads parts of other checkpoints and teachers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from edje.checkpoint import read_tokenizer_json
from edje.config import EdjeConfig, JointConfig, PreprocessConfig
from edje.features.extraction import extractor_of
from edje.first_stage.load import load_first_stage
from edje.imports.bert import load_bert
from edje.imports.bert_checkpoint import BertShape, read_shape, read_tokenizer, tokenizer_json
from edje.imports.sources import find_source
from edje.model.edje import Edje, build_edje
from edje.model.initialisation import initialise_for_training
from edje.model.weights import load_checkpoint
from edje.recipe import Recipe, RecipeError, Start
from edje.towers.base import onnx_graph
from edje.towers.sources import LoadedTower, load_tower
from edje.training.schedule import part_of
from edje.vocabulary import caption_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
#: The files of a BERT that are read.
BERT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt")
_NORM_EPS = 1e-12  # as in BERT


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model with initial weights, its configuration and its tokenizer."""

    config: EdjeConfig
    model: Edje
    tokenizer_json: str


def build_model(recipe: Recipe, captions: Iterable[str]) -> BuiltModel:
    """The recipe's model. `captions` give the vocabulary if the recipe names none. Raises `RecipeError`."""
    joint = recipe.joint
    source = None if joint.bert is None else find_source(joint.bert, BERT_FILES)
    shape = None if source is None else read_shape(source)
    if source is not None and shape is not None and recipe.vocabulary is None:
        tokenizer = tokenizer_json(source)
        vocab_size, sep_id = shape.vocab_size, shape.sep_id
    else:
        path = recipe.vocabulary
        made = caption_tokenizer(captions) if path is None else read_tokenizer(find_source(path, TOKENIZER_FILES))
        tokenizer = made.to_str()
        vocab_size, sep_id = made.get_vocab_size(), made.get_vocab()["[SEP]"]
    found = None if recipe.tower is None else load_tower(recipe.tower, image_size=recipe.image_size)
    try:
        config = EdjeConfig(
            name=recipe.name,
            trained=True,
            preprocess=_preprocess(recipe, found),
            vision=recipe.vision if found is None else found.config,  # type: ignore[arg-type]  # the recipe names one
            adapter=recipe.adapter,
            joint=_joint_config(recipe, shape, vocab_size, sep_id),
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"the parts of the model do not fit together: {error}") from error
    model = build_edje(config, graph=None if found is None else onnx_graph(found.module))
    initialise_for_training(model, recipe.seed)
    if found is not None:
        model.vision.load_state_dict(found.module.state_dict())
    if source is not None:
        load_bert(
            source,
            model.joint,
            joint.bert_layers,
            joint.bert_visual_layers,
            vocabulary=Tokenizer.from_str(tokenizer).get_vocab(),
        )
    return BuiltModel(config, model, tokenizer)


@torch.no_grad()
def normalise_inputs(adapter: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold the standardisation of patch tokens, by mean (D,) and deviation (D,), into the adapter's first layers.

    The outputs of towers differ by orders of magnitude. Folded into the weights, the standardisation costs nothing.
    """
    for name in ("fc1", "narrow", "key", "value"):
        layer = getattr(adapter, name, None)
        if isinstance(layer, nn.Linear) and layer.in_features == len(mean):
            layer.weight.div_(std)
            layer.bias.sub_(layer.weight @ mean)


@torch.no_grad()
def load_start(module: nn.Module, start: Start, tokenizer: str) -> None:
    """Load the named parts of another checkpoint into the training module. Raises `RecipeError` if they do not fit."""
    checkpoint = Path(start.checkpoint)
    theirs = {f"model.{name}": tensor for name, tensor in load_checkpoint(checkpoint).model.state_dict().items()}
    if {"text", "first_stage"} & set(start.parts) and not has_same_vocabulary(
        tokenizer, read_tokenizer_json(checkpoint)
    ):
        raise RecipeError(
            f"start: {checkpoint} has another vocabulary, so its word embeddings would belong to other words: "
            f'set vocabulary = "{checkpoint}"'
        )
    if "first_stage" in start.parts:
        tensors: dict[str, torch.Tensor] = load_first_stage(checkpoint).state_dict()
        theirs |= {f"first_stage.{name}": tensor for name, tensor in tensors.items()}
    ours = module.state_dict()
    wanted = {name for name in ours if not name.startswith("heads.") and part_of(name) in start.parts}
    wrong = sorted(name for name in wanted if name not in theirs or theirs[name].shape != ours[name].shape)
    if wrong:
        raise RecipeError(f"start: {checkpoint} has no {wrong[0]} of the shape {tuple(ours[wrong[0]].shape)}")
    for name in wanted:
        ours[name].copy_(theirs[name])


def load_teacher(checkpoint: Path, config: EdjeConfig, model: Edje, tokenizer: str) -> Edje:
    """The teacher of `model` from a checkpoint. Raises `RecipeError` if it cannot score the same batches."""
    teacher = load_checkpoint(checkpoint)
    if extractor_of(teacher.model, teacher.config).digest != extractor_of(model, config).digest:
        raise RecipeError(f"the teacher {checkpoint} has another vision tower: choose a teacher with the same tower")
    if not has_same_vocabulary(tokenizer, read_tokenizer_json(checkpoint)):
        raise RecipeError(f'the teacher {checkpoint} has another vocabulary: set vocabulary = "{checkpoint}"')
    if teacher.config.preprocess.max_caption_pieces < config.preprocess.max_caption_pieces:
        raise RecipeError(
            f"the teacher {checkpoint} reads captions of {teacher.config.preprocess.max_caption_pieces} pieces: set "
            "max_caption_pieces to this number"
        )
    return teacher.model


def has_same_vocabulary(one: str, other: str) -> bool:
    """Whether two stored tokenizers assign the same ids to the same words."""
    return one == other or Tokenizer.from_str(one).get_vocab() == Tokenizer.from_str(other).get_vocab()


def _preprocess(recipe: Recipe, found: LoadedTower | None) -> PreprocessConfig:
    if found is None:
        assert recipe.image_size is not None  # the recipe ensures it
        return PreprocessConfig(image_size=recipe.image_size, max_caption_pieces=recipe.max_caption_pieces)
    theirs = found.preprocess
    return PreprocessConfig(
        image_size=theirs.image_size,
        mean=theirs.mean,
        std=theirs.std,
        resample=theirs.resample,
        max_caption_pieces=recipe.max_caption_pieces,
    )


def _joint_config(recipe: Recipe, shape: BertShape | None, vocab_size: int, sep_id: int) -> JointConfig:
    joint = recipe.joint
    sizes: dict[str, int | None] = {"dim": joint.dim, "num_heads": joint.num_heads, "hidden_dim": joint.hidden_dim}
    if shape is not None:
        theirs: dict[str, int | None] = {"dim": shape.dim, "num_heads": shape.num_heads, "hidden_dim": shape.hidden_dim}
        wrong = [name for name, size in sizes.items() if size not in (None, theirs[name])]
        if wrong:
            raise RecipeError(
                f"joint.{wrong[0]}: {joint.bert} has {theirs[wrong[0]]}: remove the field, or set this value"
            )
        sizes = theirs
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise RecipeError(f"joint.{missing[0]} is missing: set it, or set joint.bert")
    num_layers = joint.num_layers
    if num_layers is None:
        if shape is None or joint.kind != "full":
            raise RecipeError("joint.num_layers is missing: set the number of layers that read text and image together")
        num_layers = shape.num_layers
    longest = recipe.max_caption_pieces + 2
    if joint.kind == "full":
        longest += recipe.adapter.num_tokens + 1
    return JointConfig(
        dim=sizes["dim"],  # type: ignore[arg-type]  # missing sizes were refused
        num_layers=num_layers,
        num_heads=sizes["num_heads"],  # type: ignore[arg-type]
        hidden_dim=sizes["hidden_dim"],  # type: ignore[arg-type]
        vocab_size=vocab_size,
        sep_id=sep_id,
        max_positions=longest if shape is None else max(shape.max_positions, longest),
        norm_eps=_NORM_EPS if shape is None else shape.norm_eps,
        kind=joint.kind,
        text_layers=joint.text_layers,
        visual_layers=joint.visual_layers,
        match_dim=joint.match_dim,
        # Set after the first stage is trained or fitted, by `TrainingModel.standardise`.
    )
