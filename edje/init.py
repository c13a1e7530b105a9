"""`python -m edje.init VARIANT DIR`: writes a checkpoint with untrained weights, for tests and to try the service."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from edje.checkpoint import CheckpointError
from edje.config import EdjeConfig
from edje.model.edje import build_edje
from edje.model.initialisation import initialise_untrained
from edje.model.variants import VARIANTS
from edje.model.weights import save_checkpoint
from edje.vocabulary import VocabularyError, character_tokenizer, wordpiece_tokenizer


def write_untrained(config: EdjeConfig, checkpoint: Path, *, seed: int, vocabulary: Path | None = None) -> str:
    """Write an untrained checkpoint and return its digest; the same seed gives the same digest.

    Without a vocabulary file the tokenizer has single characters.
    """
    tokenizer = character_tokenizer() if vocabulary is None else wordpiece_tokenizer(vocabulary)
    numbers = tokenizer.get_vocab()
    joint = replace(config.joint, sep_id=numbers["[SEP]"], vocab_size=max(config.joint.vocab_size, len(numbers)))
    config = replace(config, trained=False, joint=joint)
    model = build_edje(config)
    initialise_untrained(model, seed)
    return save_checkpoint(checkpoint, config, model, tokenizer.to_str())


def main(
    variant: Annotated[str, typer.Argument(help=f"Configuration of the model: {', '.join(VARIANTS)}.")],
    checkpoint: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights and the same digest.")] = 0,
    vocab: Annotated[
        Path | None, typer.Option(help="BERT's vocab.txt; without it the tokens are single characters.")
    ] = None,
) -> None:
    """Write an UNTRAINED checkpoint: random weights and meaningless scores."""
    if variant not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {variant!r}; known are {', '.join(VARIANTS)}")
    try:
        digest = write_untrained(VARIANTS[variant], checkpoint, seed=seed, vocabulary=vocab)
    except (CheckpointError, VocabularyError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{checkpoint}: model {digest}, variant {variant}, UNTRAINED: its scores mean nothing")


if __name__ == "__main__":
    typer.run(main)
