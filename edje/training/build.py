"""From a recipe to a model with weights to begin from, its tokenizer, and the first stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edje.bert import BertShape, load_bert, read_shape, tokenizer_json
from edje.config import AdapterConfig, EdjeConfig, FirstStageConfig, JointConfig, PreprocessConfig
from edje.hub import find_source
from edje.model import Edje, build_edje
from edje.recipe import Recipe, RecipeError
from edje.tower_sources import FoundTower, tower_from
from edje.towers import BorrowedTower
from edje.vocabulary import caption_tokenizer, wordpiece_tokenizer
from edje.weights import load_checkpoint

#: The files of a BERT that are needed.
BERT_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt")
_TABLE_STD = 0.02  # as in BERT
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
    if source is not None and recipe.vocabulary is None:
        tokenizer = tokenizer_json(source)
        vocab_size, sep_id = _counted(shape)
    else:
        path = recipe.vocabulary
        made = caption_tokenizer(captions) if path is None else wordpiece_tokenizer(find_source(path, ("vocab.txt",)))
        tokenizer = made.to_str()
        vocab_size, sep_id = made.get_vocab_size(), made.token_to_id("[SEP]")
    found = None if recipe.tower is None else tower_from(recipe.tower, image_size=recipe.image_size)
    config = EdjeConfig(
        name=recipe.name,
        trained=True,
        preprocess=_preprocess(recipe, found),
        vision=recipe.vision if found is None else found.config,  # type: ignore[arg-type]  # one of them is given
        adapter=recipe.adapter,
        joint=_joint_config(recipe, shape, vocab_size, sep_id),
    )
    model = build_edje(config, graph=None if found is None else _graph(found))
    draw_for_training(model, recipe.seed)
    if found is not None:
        model.vision.load_state_dict(found.module.state_dict())
    if source is not None:
        load_bert(source, model.joint, joint.bert_layers, joint.bert_visual_layers)
    if recipe.start is not None:
        take_over(model, Path(recipe.start))
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
        else:
            std = _TABLE_STD if name.endswith(_TABLES) else parameter[0].numel() ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    if model.joint.head is not None:
        # The first logits are zero, or what the first stage says: no order of its own before anything was learned.
        model.joint.head.out.weight.zero_()


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
def take_over(model: Edje, checkpoint: Path) -> None:
    """Start from another checkpoint's weights, wherever it has one of the same name and shape."""
    theirs = load_checkpoint(checkpoint).model.state_dict()
    ours = model.state_dict()
    shared = {name: tensor for name, tensor in theirs.items() if name in ours and ours[name].shape == tensor.shape}
    if not shared:
        raise RecipeError(f"start: {checkpoint} shares no weight with this model")
    model.load_state_dict(shared, strict=False)


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
    sizes = {"dim": joint.dim, "num_heads": joint.num_heads, "hidden_dim": joint.hidden_dim}
    if shape is not None:
        theirs = {"dim": shape.dim, "num_heads": shape.num_heads, "hidden_dim": shape.hidden_dim}
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
        kind=joint.kind,
        text_layers=joint.text_layers,
        visual_layers=joint.visual_layers,
        match_dim=joint.match_dim,
        # The standard deviation is known when the first stage is; see `edje.training.run`.
        first_stage=FirstStageConfig(mean=0.0, std=1.0) if joint.reads_first_stage else None,
    )


def _counted(shape: BertShape | None) -> tuple[int, int]:
    assert shape is not None
    return shape.vocab_size, shape.sep_id


def _graph(found: FoundTower) -> bytes | None:
    from edje.towers import graph_of

    return graph_of(found.module)


__all__ = ["AdapterConfig", "Built", "build_from", "centre_inputs", "draw_for_training"]
