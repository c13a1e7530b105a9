"""`python -m edje.convert SOURCE DEST`: the authors' weights as a checkpoint of ours that gives the logits theirs give.

Reads their file and writes ours. Tensor names: `edje.imports.authors`; sources of files: `edje.imports.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from edje.checkpoint import CheckpointError, CheckpointExists
from edje.config import EdjeConfig
from edje.imports.authors import AuthorsError, Chosen, Layout, check_names, config_of, layout_of, twin_words, unwrapped
from edje.imports.bert_checkpoint import BertConfig, BertError, load_pickled, read_bert_config, read_tokenizer
from edje.imports.layouts import listed, misshapen, size
from edje.imports.sources import SourceError, find_source, only_file
from edje.model.edje import Edje, build_edje
from edje.model.weights import save_checkpoint
from edje.text import Tokenizer
from edje.tower_config import Count, VitConfig
from protocols.validation import first_problem

#: What their joint encoder started from, and so the tokenizer that its words belong to.
MINILM = "hub:microsoft/MiniLM-L12-H384-uncased"
_WEIGHTS = "*.pth"
_PARTS = TypeAdapter(dict[str, object])
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Imported:
    """A model made of the authors' weights, and remarks for whoever imports it."""

    config: EdjeConfig
    model: Edje
    remarks: tuple[str, ...]


class TowerConfig(BaseModel):
    """What a `config.json` of a SigLIP tower says; where the weights say it too, both have to agree."""

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
) -> tuple[str, Imported]:
    """Write a checkpoint from the authors' `.pth` and return its digest and what was imported.

    Raises `AuthorsError`, `BertError` (the tokenizer) or `CheckpointError`.
    """
    words = read_tokenizer(tokenizer)
    chosen = Chosen(
        sep_id=words.token_to_id("[SEP]") or 0,
        tower_heads=_agreed("vision", tower_heads, tower),
        joint_heads=_agreed("joint", joint_heads, bert),
        tower_eps=tower.layer_norm_eps if tower else 1e-6,
        joint_eps=bert.layer_norm_eps if bert else 1e-12,
        canonical_captions=canonical_captions,
    )
    imported = import_model(read_state(weights), chosen)
    _compare(imported.config, tower, bert)
    Tokenizer(words.to_str(), imported.config)  # refuses a tokenizer that belongs to another model
    return save_checkpoint(checkpoint, imported.config, imported.model, words.to_str()), imported


def read_state(weights: Path) -> dict[str, Tensor]:
    """The named tensors of a `.pth` file, without the prefixes of torch's wrappers. Raises `AuthorsError`."""
    try:
        loaded = load_pickled(weights)
    except ValueError as error:
        raise AuthorsError(str(error)) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping) or not state:
        raise AuthorsError(f'{weights} holds no {{"model": weights by name}}: it is no file of the authors\' layout')
    strange = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise AuthorsError(f"{weights} holds what is no tensor: {listed(strange)}")
    return {inner: state[outer] for inner, outer in unwrapped(state).items()}


def import_model(state: Mapping[str, Tensor], chosen: Chosen) -> Imported:
    """Our model with their weights, in float32. Raises `AuthorsError` with every name that is wrong."""
    layout = layout_of(list(state))
    rules = layout.rules()
    missing, unexpected, aside = check_names(list(state), rules)
    wrong = {"missing": missing, "unexpected": unexpected}
    try:
        config = config_of(layout, {name: tuple(tensor.shape) for name, tensor in state.items()}, chosen)
        model = build_edje(config, device="meta")
        wrong["wrongly shaped"] = misshapen(state, rules, model.state_dict()) + _unlike_twins(layout, state)
    except (AuthorsError, KeyError):  # too much is missing or odd to say which shapes are wrong
        if missing or unexpected:
            raise AuthorsError(_sentence(wrong)) from None
        raise
    if any(wrong.values()):
        raise AuthorsError(_sentence(wrong))
    ours = {rule.ours: rule.apply(state).to(torch.float32) for rule in rules}
    endless = [rule.theirs[0] for rule in rules if not torch.isfinite(ours[rule.ours]).all()]
    if endless:
        raise AuthorsError(_sentence({"not finite": endless}))
    model.load_state_dict(ours, assign=True)
    return Imported(config, model.eval().requires_grad_(False), _remarks(aside, layout, state))


def read_tower_config(path: Path) -> TowerConfig:
    """A SigLIP tower's `config.json`, or that of the model it is a part of. Raises `AuthorsError`."""
    try:
        parts = _PARTS.validate_json(path.read_bytes())
        return TowerConfig.model_validate(parts.get("vision_config", parts))
    except OSError as error:
        raise AuthorsError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise AuthorsError(f"{path} describes no SigLIP tower: {first_problem(error, root='the file')}") from error


def _tokenizer(source: str | None) -> Path:
    """Where the tokenizer is; without a word about it, the one that belongs to MiniLM."""
    try:
        return find_source(source or MINILM, _TOKENIZER_FILES)
    except SourceError as error:
        hint = "" if source else "; the tokenizer is BERT's: give its vocab.txt with --tokenizer"
        raise SourceError(f"{error}{hint}") from error


def _agreed(part: str, heads: int | None, config: TowerConfig | BertConfig | None) -> int | None:
    if heads and config and heads != config.num_attention_heads:
        raise AuthorsError(
            f"--{part}-heads says {heads}, --{part}-config {config.num_attention_heads}: leave one of them out"
        )
    return config.num_attention_heads if config else heads


def _compare(config: EdjeConfig, tower: TowerConfig | None, bert: BertConfig | None) -> None:
    """Raise `AuthorsError` where a configuration file describes another model than the weights make."""
    assert isinstance(config.vision, VitConfig)  # nothing else is imported
    for part, file, ours in (("vision", tower, config.vision), ("joint", bert, config.joint)):
        said = {
            "hidden_size": ours.dim,
            "num_hidden_layers": ours.num_layers,
            "intermediate_size": ours.hidden_dim,
        }
        wrong = [
            f"{name} {getattr(file, name)} for {number}"
            for name, number in said.items()
            if file is not None and getattr(file, name) != number
        ]
        if wrong:
            raise AuthorsError(f"--{part}-config belongs to another model than the weights: {listed(wrong)}")


def _unlike_twins(layout: Layout, state: Mapping[str, Tensor]) -> list[str]:
    """A remark where the two tables of words cannot be the same one."""
    twins = [name for name in twin_words(layout) or () if name in state]
    same = len({state[name].shape for name in twins}) <= 1
    return [] if same else [" but ".join(f"{name} is {size(state[name].shape)}" for name in twins)]


def _sentence(wrong: Mapping[str, list[str]]) -> str:
    """Everything that is wrong, by name, each kind with its count."""
    kinds = (f"{len(names)} {kind}: {listed(names)}" for kind, names in wrong.items() if names)
    return "these are not the authors' weights, or not whole. " + "; ".join(kinds)


def _remarks(aside: Mapping[str, int], layout: Layout, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What of their file was not used, and what in it is odd."""
    remarks = [f"not needed: {number} tensors of {what}" for what, number in aside.items()]
    twins = twin_words(layout)
    if twins and not torch.equal(state[twins[0]], state[twins[1]]):
        remarks.append(f"{twins[0]} and {twins[1]} differ: the first is read, as when the pair is embedded")
    return tuple(remarks)


def main(
    source: Annotated[str, typer.Argument(help="The authors' .pth file, or hub:OWNER/NAME.")],
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
        int | None, typer.Option(min=1, help="Heads of the tower, where its width leaves it open.")
    ] = None,
    joint_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the BERT, where its width leaves it open.")
    ] = None,
    canonical_captions: Annotated[
        bool, typer.Option(help="Lower case without punctuation, as the authors trained; or captions as they come.")
    ] = True,
) -> None:
    """Import the authors' weights: a checkpoint that gives the logits theirs give."""
    try:
        # What may be refused at once goes before what may take a download.
        if checkpoint.exists() and (not checkpoint.is_dir() or any(checkpoint.iterdir())):
            raise CheckpointExists(f"{checkpoint} exists: remove it or choose another folder")
        words = _tokenizer(tokenizer)
        digest, imported = convert(
            only_file(find_source(source, [_WEIGHTS]), _WEIGHTS),
            checkpoint,
            words,
            tower=None if vision_config is None else read_tower_config(vision_config),
            bert=None if joint_config is None else read_bert_config(joint_config),
            tower_heads=vision_heads,
            joint_heads=joint_heads,
            canonical_captions=canonical_captions,
        )
    except (AuthorsError, BertError, CheckpointError, SourceError) as error:
        # One plain line: a frame around it would break the names it lists.
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
