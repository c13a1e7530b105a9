"""From a recipe to a model with weights to begin from, its tokenizer, and the first stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from edje.checkpoint import read_tokenizer_json
from edje.config import EdjeConfig, FirstStageConfig, JointConfig, PreprocessConfig
from edje.features.extraction import extractor_of
from edje.first_stage.dual_encoder import load_first_stage
from edje.imports.bert import BertShape, load_bert, read_shape, tokenizer_json
from edje.imports.bert_checkpoint import read_tokenizer
from edje.imports.sources import find_source
from edje.model.adapter import Adapter, LocalAdapter, Places
from edje.model.edje import Edje, build_edje
from edje.model.weights import load_checkpoint
from edje.recipe import Recipe, RecipeError, Start
from edje.towers.base import BorrowedTower, graph_of
from edje.towers.sources import FoundTower, tower_from
from edje.training.schedule import part_of
from edje.vocabulary import caption_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
#: The files of a BERT that are needed.
BERT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt")
_TABLE_STD, _NORM_EPS = 0.02, 1e-12  # as in BERT
_PLACES_STD = 1.0  # as large as the states they are added to
_PLACES = ("meeting_positions.weight", "places.table.weight")
_TABLES = ("words.weight", "positions.weight", "types.weight", ".positions", "query", "probe")


@dataclass(frozen=True, slots=True)
class Built:
    """A model that can be trained, and what a checkpoint of it needs besides."""

    config: EdjeConfig
    model: Edje
    tokenizer_json: str


def build_from(recipe: Recipe, captions: Iterable[str]) -> Built:
    """The recipe's model; `captions` give the vocabulary where the recipe names none. Raises `RecipeError`."""
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
    found = None if recipe.tower is None else tower_from(recipe.tower, image_size=recipe.image_size)
    try:
        config = EdjeConfig(
            name=recipe.name,
            trained=True,
            preprocess=_preprocess(recipe, found),
            vision=recipe.vision if found is None else found.config,  # type: ignore[arg-type]  # one of them is given
            adapter=recipe.adapter,
            joint=_joint_config(recipe, shape, vocab_size, sep_id),
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"the parts of the model do not fit together: {error}") from error
    model = build_edje(config, graph=None if found is None else graph_of(found.module))
    draw_for_training(model, recipe.seed)
    if found is not None:
        model.vision.load_state_dict(found.module.state_dict())
    if source is not None:
        load_bert(source, model.joint, joint.bert_layers, joint.bert_visual_layers)
    return Built(config, model, tokenizer)


@torch.no_grad()
def draw_for_training(model: Edje, seed: int) -> None:
    """Weights that learn well: matrices keep the size of what passes through, tables are small, as in BERT."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if isinstance(model.vision, BorrowedTower) and name.startswith("vision."):
            continue
        if parameter.ndim == 0:
            continue  # scales keep the value that their module gives them
        if name.endswith(("bias", "absent")):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name.endswith(_PLACES):
            parameter.normal_(0.0, _PLACES_STD, generator=generator)
        else:
            std = _TABLE_STD if name.endswith(_TABLES) else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    begin_at_places(model.adapter)
    if model.joint.head is not None:
        # The first logits are zero, or what the first stage says: no order of its own before anything was learned.
        model.joint.head.out.weight.zero_()


@torch.no_grad()
def begin_at_places(adapter: Adapter) -> None:
    """Have each query of a compressor look at a place of its own first, where the adapter knows places.

    It is that place's vector, and is compared with keys through the keys' own map. Drawn at random, queries look at
    everything alike, and what is made of a picture then says what is in it, but not where.
    """
    if isinstance(adapter, LocalAdapter) or not isinstance(adapter.places, Places):
        return
    adapter.query.add_(adapter.places.spread(adapter.query.shape[1]))
    for crossing in adapter.crossings:
        weight = crossing.attention.in_proj_weight
        dim = weight.shape[1]
        weight[:dim] = weight[dim : 2 * dim]


@torch.no_grad()
def centre_inputs(adapter: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make the adapter's first maps act as if patches (D,) came with zero mean and unit deviation.

    Towers differ by orders of magnitude in what they put out; folded into the weights it costs nothing to serve.
    """
    for name in ("fc1", "narrow", "key", "value"):
        layer = getattr(adapter, name, None)
        if isinstance(layer, nn.Linear) and layer.in_features == len(mean):
            layer.weight.div_(std)
            layer.bias.sub_(layer.weight @ mean)


@torch.no_grad()
def take_over(module: nn.Module, start: Start, tokenizer: str) -> None:
    """Give the training module the named parts of another checkpoint. Raises `RecipeError` if they do not fit."""
    checkpoint = Path(start.checkpoint)
    theirs = {f"model.{name}": tensor for name, tensor in load_checkpoint(checkpoint).model.state_dict().items()}
    if {"text", "first_stage"} & set(start.parts) and not same_words(tokenizer, read_tokenizer_json(checkpoint)):
        raise RecipeError(
            f"start: {checkpoint} has another vocabulary, so its words would be taken for others: "
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


def draw_heads(heads: nn.Module, seed: int) -> None:
    """Weights of what only training needs, to begin with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(heads.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


def load_teacher(checkpoint: Path, config: EdjeConfig, model: Edje, tokenizer: str) -> Edje:
    """A model to distil from into `model`. Raises `RecipeError` if it would read the same batch otherwise."""
    teacher = load_checkpoint(checkpoint)
    if extractor_of(teacher.model, teacher.config).digest != extractor_of(model, config).digest:
        raise RecipeError(f"the teacher {checkpoint} looks through another tower: distil from one that shares it")
    if not same_words(tokenizer, read_tokenizer_json(checkpoint)):
        raise RecipeError(f'the teacher {checkpoint} has another vocabulary: set vocabulary = "{checkpoint}"')
    if teacher.config.preprocess.max_caption_pieces < config.preprocess.max_caption_pieces:
        raise RecipeError(
            f"the teacher {checkpoint} reads captions of {teacher.config.preprocess.max_caption_pieces} pieces: set "
            "max_caption_pieces to that"
        )
    return teacher.model


def same_words(one: str, other: str) -> bool:
    """Whether two stored tokenizers give the same ids to the same words."""
    return one == other or Tokenizer.from_str(one).get_vocab() == Tokenizer.from_str(other).get_vocab()


def _preprocess(recipe: Recipe, found: FoundTower | None) -> PreprocessConfig:
    if found is None:
        assert recipe.image_size is not None  # the recipe was checked
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
            raise RecipeError(f"joint.{wrong[0]}: {joint.bert} has {theirs[wrong[0]]}; leave it out")
        sizes = theirs
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise RecipeError(f"joint.{missing[0]} is missing: give it, or a BERT to start from")
    num_layers = joint.num_layers
    if num_layers is None:
        if shape is None or joint.kind != "full":
            raise RecipeError("joint.num_layers is missing: how many layers read text and image together?")
        num_layers = shape.num_layers
    longest = recipe.max_caption_pieces + 2
    if joint.kind == "full":
        longest += recipe.adapter.num_tokens + 1
    return JointConfig(
        dim=sizes["dim"],  # type: ignore[arg-type]  # none is None
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
        # The standard deviation is known when the first stage is; see `edje.training.run`.
        first_stage=FirstStageConfig(mean=0.0, std=1.0) if joint.reads_first_stage else None,
    )
