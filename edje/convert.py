"""`python -m edje.convert SOURCE DEST`: converts the authors' weights to a checkpoint with the same logits.

Tensor names: `edje.imports.authors`; sources of files: `edje.imports.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from edje.checkpoint import CheckpointError, CheckpointExists
from edje.config import EdjeConfig
from edje.imports.authors import (
    AUTHORS_PREFIXES,
    AuthorsError,
    AuthorsLayout,
    ImportOptions,
    check_names,
    config_of,
    duplicate_word_tables,
    layout_of,
    without_wrappers,
)
from edje.imports.bert_checkpoint import BertConfig, BertError, load_pickled, read_bert_config, read_tokenizer
from edje.imports.layouts import format_shape, join_names, shape_mismatches
from edje.imports.sources import SourceError, find_source, only_file
from edje.model.edje import Edje, build_edje
from edje.model.weights import save_checkpoint
from edje.text import Tokenizer
from edje.tower_config import Count, VitConfig
from protocols.validation import first_problem

#: The model from which the authors trained their joint encoder, and whose tokenizer they use.
MINILM = "hub:microsoft/MiniLM-L12-H384-uncased"
#: Name patterns of files of weights; the second pattern is used if no file matches the first.
_WEIGHTS = ("*.pth", "*.safetensors")
_PARTS = TypeAdapter(dict[str, object])
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A model with the authors' weights, and remarks for the user."""

    config: EdjeConfig
    model: Edje
    remarks: tuple[str, ...]


class TowerConfig(BaseModel):
    """The fields of a SigLIP tower's `config.json`; fields that the weights also imply must agree with them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    num_attention_heads: Count
    hidden_size: Count
    num_hidden_layers: Count
    intermediate_size: Count
    patch_size: Count
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


def convert(
    weights: Path,
    checkpoint: Path,
    tokenizer: Path,
    *,
    tower: TowerConfig | None = None,
    bert: BertConfig | None = None,
    tower_heads: int | None = None,
    joint_heads: int | None = None,
    canonical_captions: bool = True,
) -> tuple[str, ImportedModel]:
    """Write a checkpoint from the authors' file and return its digest and the model.

    Raises `AuthorsError`, `BertError` (the tokenizer) or `CheckpointError`.
    """
    words = read_tokenizer(tokenizer)
    options = ImportOptions(
        sep_id=words.token_to_id("[SEP]") or 0,
        tower_heads=_agreed("vision", tower_heads, tower),
        joint_heads=_agreed("joint", joint_heads, bert),
        tower_eps=tower.layer_norm_eps if tower else 1e-6,
        joint_eps=bert.layer_norm_eps if bert else 1e-12,
        canonical_captions=canonical_captions,
    )
    imported = import_model(read_weights(weights), options)
    _compare(imported.config, tower, bert)
    Tokenizer(words.to_str(), imported.config)  # raises for a tokenizer of another model
    return save_checkpoint(checkpoint, imported.config, imported.model, words.to_str()), imported


def read_weights(weights: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.safetensors` file by name, without the prefixes of torch's wrappers.

    Raises `AuthorsError`.
    """
    loaded = _read_safetensors(weights) if _is_safetensors(weights) else _read_pickled(weights)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping) or not state:
        raise AuthorsError(f'{weights} holds no dictionary {{"model": weights by name}}: give the authors\' file')
    strange = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise AuthorsError(f"{weights} holds objects that are not tensors: {join_names(strange)}")
    return {inner: state[outer] for inner, outer in without_wrappers(state).items()}


def _is_safetensors(weights: Path) -> bool:
    """Whether the file is named or begins like one of the safetensors library."""
    if weights.suffix == ".safetensors" or not weights.is_file():
        return weights.suffix == ".safetensors"
    with weights.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_pickled(weights: Path) -> object:
    try:
        return load_pickled(weights)
    except ValueError as error:
        raise AuthorsError(str(error)) from error


def _read_safetensors(weights: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(weights)
    except (OSError, SafetensorError) as error:
        raise AuthorsError(
            f"{weights} is not a complete safetensors file ({error}): download or copy it again"
        ) from error


def _require_authors_names(state: Mapping[str, Tensor]) -> None:
    """Raise `AuthorsError` for the weights of another kind of model, with the way to use them."""
    prefixes = {name.partition(".")[0] for name in state}
    if prefixes & AUTHORS_PREFIXES:
        return
    hint = "give the authors' file"
    if {"vision", "adapter", "joint"} <= prefixes:
        hint = "these are the weights of a checkpoint that is already converted; use its folder"
    elif prefixes & {"bert", "embeddings", "encoder"}:
        hint = "a BERT or another text encoder starts training with `joint.bert` in a recipe"
    elif prefixes & {"vision_model", "text_model"}:
        hint = 'a SigLIP or CLIP model is used with `tower = "hub:FOLDER"` in a recipe'
    names = join_names(sorted(state)[:5])
    raise AuthorsError(f"none of the {len(state)} tensors has a name of the authors' weights ({names}, ...): {hint}")


def import_model(state: Mapping[str, Tensor], options: ImportOptions) -> ImportedModel:
    """Our model with their weights, in float32. Raises `AuthorsError`, which names every tensor that does not fit."""
    _require_authors_names(state)
    layout = layout_of(list(state))
    rules = layout.rules()
    missing, unexpected, unneeded = check_names(list(state), rules)
    wrong = {"missing": missing, "unexpected": unexpected}
    try:
        config = config_of(layout, {name: tuple(tensor.shape) for name, tensor in state.items()}, options)
        model = build_edje(config, device="meta")
        wrong["wrongly shaped"] = shape_mismatches(state, rules, model.state_dict()) + _differing_word_tables(
            layout, state
        )
    except (AuthorsError, KeyError):  # without all names the shapes cannot be compared
        if missing or unexpected:
            raise AuthorsError(_sentence(wrong)) from None
        raise
    if any(wrong.values()):
        raise AuthorsError(_sentence(wrong))
    ours = {rule.ours: rule.apply(state).to(torch.float32) for rule in rules}
    not_finite = [rule.theirs[0] for rule in rules if not torch.isfinite(ours[rule.ours]).all()]
    if not_finite:
        raise AuthorsError(_sentence({"not finite": not_finite}))
    model.load_state_dict(ours, assign=True)
    return ImportedModel(config, model.eval().requires_grad_(False), _remarks(unneeded, layout, state))


def read_tower_config(path: Path) -> TowerConfig:
    """Read the `config.json` of a SigLIP tower or of a whole SigLIP model. Raises `AuthorsError`."""
    try:
        parts = _PARTS.validate_json(path.read_bytes())
        return TowerConfig.model_validate(parts.get("vision_config", parts))
    except OSError as error:
        raise AuthorsError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise AuthorsError(
            f"{path} does not describe a SigLIP tower: {first_problem(error, root='the file')}"
        ) from error


def _find_weights(source: str) -> Path:
    """The local path of the only file of weights in a source. Raises `SourceError`."""
    for pattern in _WEIGHTS:
        path = find_source(source, [pattern])
        if path.is_file() or any(path.glob(pattern)):
            return only_file(path, pattern)
    raise SourceError(f"{source} holds no file {' or '.join(_WEIGHTS)}: give the path of the authors' file")


def _tokenizer(source: str | None) -> Path:
    """The path of the tokenizer; without a source, of MiniLM's."""
    try:
        return find_source(source or MINILM, _TOKENIZER_FILES)
    except SourceError as error:
        hint = "" if source else "; the tokenizer is BERT's: give its vocab.txt with --tokenizer"
        raise SourceError(f"{error}{hint}") from error


def _agreed(part: str, heads: int | None, config: TowerConfig | BertConfig | None) -> int | None:
    if heads and config and heads != config.num_attention_heads:
        raise AuthorsError(
            f"--{part}-heads is {heads}, --{part}-config has {config.num_attention_heads}: leave one of them out"
        )
    return config.num_attention_heads if config else heads


def _compare(config: EdjeConfig, tower: TowerConfig | None, bert: BertConfig | None) -> None:
    """Raise `AuthorsError` if a configuration file does not describe the model of these weights."""
    assert isinstance(config.vision, VitConfig)  # nothing else is imported
    for part, file, ours in (("vision", tower, config.vision), ("joint", bert, config.joint)):
        expected = {
            "hidden_size": ours.dim,
            "num_hidden_layers": ours.num_layers,
            "intermediate_size": ours.hidden_dim,
        }
        wrong = [
            f"{name} is {getattr(file, name)} instead of {number}"
            for name, number in expected.items()
            if file is not None and getattr(file, name) != number
        ]
        if wrong:
            raise AuthorsError(f"--{part}-config belongs to another model than the weights: {join_names(wrong)}")


def _differing_word_tables(layout: AuthorsLayout, state: Mapping[str, Tensor]) -> list[str]:
    """A phrase if the two tables of words have different shapes."""
    tables = [name for name in duplicate_word_tables(layout) or () if name in state]
    same = len({state[name].shape for name in tables}) <= 1
    return [] if same else [" but ".join(f"{name} is {format_shape(state[name].shape)}" for name in tables)]


def _sentence(wrong: Mapping[str, list[str]]) -> str:
    """A sentence that names all tensors that do not fit, by kind."""
    kinds = (f"{len(names)} {kind}: {join_names(names)}" for kind, names in wrong.items() if names)
    return "the file does not hold the authors' complete weights: " + "; ".join(kinds)


def _remarks(unneeded: Mapping[str, int], layout: AuthorsLayout, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Remarks on tensors that were not used, and on tables of words that differ."""
    remarks = [f"not needed: {number} tensors of {description}" for description, number in unneeded.items()]
    tables = duplicate_word_tables(layout)
    if tables and not torch.equal(state[tables[0]], state[tables[1]]):
        remarks.append(f"{tables[0]} and {tables[1]} differ: the first was read, because it embeds the pair")
    return tuple(remarks)


def main(
    source: Annotated[str, typer.Argument(help="The authors' .pth or .safetensors file, or hub:OWNER/NAME.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write; must be new or empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="vocab.txt, tokenizer.json, a folder with one of them, package:NAME/folder or hub:OWNER/NAME; "
            "without it MiniLM's, from the hub."
        ),
    ] = None,
    vision_config: Annotated[
        Path | None, typer.Option(help="config.json of the SigLIP tower, for unusual ones.")
    ] = None,
    joint_config: Annotated[Path | None, typer.Option(help="config.json of the BERT, for unusual ones.")] = None,
    vision_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the tower, if they do not follow from its width.")
    ] = None,
    joint_heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of the BERT, if they do not follow from its width.")
    ] = None,
    canonical_captions: Annotated[
        bool,
        typer.Option(help="Captions in lower case without punctuation, as in the authors' training; or as written."),
    ] = True,
) -> None:
    """Convert the authors' weights to a checkpoint with the same logits."""
    try:
        # Checks that need no download come first.
        if checkpoint.exists() and (not checkpoint.is_dir() or any(checkpoint.iterdir())):
            raise CheckpointExists(f"{checkpoint} exists: remove it or choose another folder")
        words = _tokenizer(tokenizer)
        digest, imported = convert(
            _find_weights(source),
            checkpoint,
            words,
            tower=None if vision_config is None else read_tower_config(vision_config),
            bert=None if joint_config is None else read_bert_config(joint_config),
            tower_heads=vision_heads,
            joint_heads=joint_heads,
            canonical_captions=canonical_captions,
        )
    except (AuthorsError, BertError, CheckpointError, SourceError) as error:
        # One plain line: a frame would break the names of tensors.
        typer.echo(f"Not converted: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"Not converted: {error.filename or checkpoint} cannot be used: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    for remark in imported.remarks:
        typer.echo(remark, err=True)
    typer.echo(f"{checkpoint}: model {digest}, {imported.config.name}")


if __name__ == "__main__":
    typer.run(main)
