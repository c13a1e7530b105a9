"""`python -m edje.calibrate CHECKPOINT --data FILE --out FOLDER`: a copy of a checkpoint with a new calibration.

Fits the weight of the first stage, temperature and offset of both directions on a split that the model was not trained
on; the weights stay. The copy has a new model digest, so images must be indexed for it again. The exit status is 0, 1
with a message if the checkpoint or the data cannot be used, or 2 for an invalid command line.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edje.calibration import Calibration
from edje.checkpoint import CheckpointError, read_tokenizer_json
from edje.data.dataset import DataError, Split
from edje.data.spec import open_dataset
from edje.evaluation.data_file import read_data_spec
from edje.evaluation.encoded_split import CHECKPOINT_FIRST_STAGE, EncodedSplit, encode_split
from edje.evaluation.errors import EvaluationError
from edje.evaluation.scorers import FULL, make_scorer
from edje.evaluation.storage import Storage
from edje.evaluation.task import image_to_text, text_to_image
from edje.features.storage import FeaturesError
from edje.first_stage.base import FOLDER
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.optional import PackageMissing
from edje.training.calibrate import calibrate

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def fit_split(encoded: EncodedSplit, k: int) -> Calibration:
    """Fit both directions on an encoded split. Raises `EvaluationError` for a k that the split does not allow."""
    pairs = encoded.similarity, encoded.image_of_caption
    return Calibration(
        text_to_image=calibrate(text_to_image(*pairs), make_scorer(FULL, encoded, "text-to-image"), k),
        image_to_text=calibrate(image_to_text(*pairs), make_scorer(FULL, encoded, "image-to-text"), k),
    )


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the model to calibrate; it is not changed.")],
    data: Annotated[Path, typer.Option(help="TOML file that describes the dataset: a recipe, or its table `data`.")],
    out: Annotated[Path, typer.Option(help="Folder of the calibrated copy; must be new or empty.")],
    split: Annotated[Split, typer.Option(help="The split to fit on; never one the model was trained on.")] = "dev",
    k: Annotated[int, typer.Option(min=1, help="Candidates per query, as many as the service will rerank.")] = 20,
    storage: Annotated[Storage, typer.Option(help="Storage type of the visual tokens.")] = "int8",
    first_stage: Annotated[
        str,
        typer.Option(help="checkpoint: the one it holds; maxsim; or a .npy file of (captions, images) similarities."),
    ] = CHECKPOINT_FIRST_STAGE,
    features: Annotated[Path, typer.Option(help="Folder of the tower's features; shared with training.")] = Path(
        "build/features"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Write a copy of a checkpoint whose relevance scores are probabilities."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # before anything is computed
        raise typer.BadParameter(f"{out} exists: remove it or choose another folder", param_hint="--out")
    try:
        dataset = open_dataset(read_data_spec(data), split, strict=True)
        encoded = encode_split(
            checkpoint, dataset, split, storage, features=features, first_stage=first_stage, device=device,
            console=remarks,
        )  # fmt: skip
        calibration = fit_split(encoded, k)
        loaded = load_checkpoint(checkpoint)
        config = replace(loaded.config, calibration=calibration)
        digest = save_checkpoint(out, config, loaded.model, read_tokenizer_json(checkpoint))
        if (checkpoint / FOLDER).is_dir():
            shutil.copytree(checkpoint / FOLDER, out / FOLDER)
    except (CheckpointError, DataError, EvaluationError, FeaturesError, OSError, PackageMissing) as error:
        remarks.print(str(error))
        raise typer.Exit(1) from error
    for direction, constants in calibration.by_direction():
        remarks.print(f"{direction}: {constants.summary()}")
    typer.echo(f"{out}: model {digest}")


if __name__ == "__main__":
    typer.run(main)
