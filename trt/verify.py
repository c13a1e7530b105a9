"""`python -m trt.verify A B`: checks that engine B ranks the same pairs like the reference engine A.

    python -m trt.verify torch:CHECKPOINT engines/model      a built engine against its checkpoint
    python -m trt.verify engines/old engines/new             a rebuilt engine against the one in use
    python -m trt.verify onnx:engines/model engines/model    the plans against their graphs

The last line on standard output is one JSON document. The exit status is 0 if the engines agree; 1 if they differ by
more than the thresholds or cannot be compared; and 2 for invalid arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from edje.checkpoint import CheckpointError, read_config
from edje.config import EdjeConfig
from edje.model.weights import load_checkpoint
from edje.optional import PackageMissing
from edje.progress import progress_bars
from edje.text import Tokenizer
from protocols.validation import first_problem
from trt.build.assemble import require_agreement
from trt.check.pairs import parity_pairs
from trt.check.reporting import report_on, scored, torch_reference
from trt.contract import Engine, EngineError, EngineMismatch
from trt.load import open_onnx, open_tensorrt
from trt.manifest import Manifest, read_manifest
from trt.parity import THRESHOLDS, Thresholds

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
_RUNTIMES = ("torch", "onnx", "tensorrt")


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine named on the command line."""

    runtime: str
    path: Path
    manifest: Manifest | None  # None for torch, which runs a checkpoint

    @property
    def config(self) -> EdjeConfig:
        return read_config(self.path) if self.manifest is None else self.manifest.config

    def load(self, storage: str, num_slots: int, device: str) -> Engine:
        """Load the engine with slots of this storage type."""
        if self.manifest is None:
            return torch_reference(load_checkpoint(self.path), storage, num_slots)
        options = self.manifest.options
        if self.runtime == "onnx":
            return open_onnx(self.path, self.manifest, num_slots, options.max_pairs, options.max_images, None)
        return open_tensorrt(self.path, self.manifest, num_slots, options.max_pairs, options.max_images, device)


def subject(name: str) -> Subject:
    """Parse `torch:CHECKPOINT`, `onnx:DIR`, `tensorrt:DIR`, or `DIR` (its plans if it has any, else its graphs)."""
    prefix, colon, rest = name.partition(":")
    runtime, path = (prefix, Path(rest)) if colon and prefix in _RUNTIMES else ("", Path(name))
    if runtime == "torch":
        return Subject(runtime, path, None)
    manifest = read_manifest(path)
    return Subject(runtime or ("onnx" if manifest.built_on is None else "tensorrt"), path, manifest)


def storage_of(subjects: tuple[Subject, Subject], asked: str | None) -> str:
    """Return the storage type that both engines read. Raises `EngineMismatch` if they differ."""
    built = [each.manifest.options.storage for each in subjects if each.manifest is not None]
    wanted = {*built, *([asked] if asked else [])} or {"int8"}
    if len(wanted) > 1:
        raise EngineMismatch(f"different storage types ({', '.join(sorted(wanted))}): rebuild one of the engines")
    return wanted.pop()


def main(
    reference: Annotated[str, typer.Argument(metavar="A", help="torch:CHECKPOINT or an engine directory.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Engine to check, in the same notation.")],
    storage: Annotated[
        str | None, typer.Option(help="Storage type of tokens; default: the engines' type, or int8.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint whose tokenizer encodes captions if neither A nor B is a checkpoint."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Number of texts in the comparison.")] = 48,
    num_images: Annotated[
        int, typer.Option(min=2, help="Number of images in the comparison, each paired with every text.")
    ] = 24,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Photographs for the comparison, optionally with captions.txt; default: scenes or random images.",
        ),
    ] = None,
    top1: Annotated[float | None, typer.Option(help="Lowest allowed share of texts with the same best image.")] = None,
    tau: Annotated[float | None, typer.Option(help="Lowest allowed mean of Kendall's tau.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest allowed error of a logit, in standard deviations of the logits.")
    ] = None,
    device: Annotated[str, typer.Option(help="GPU for plans: cuda or cuda:N.")] = "cuda",
) -> None:
    """Compare two engines; the default thresholds are those of B's precision."""
    try:
        pair = subject(reference), subject(other)
        kind = storage_of(pair, storage)
        if pair[0].config != pair[1].config:
            raise EngineMismatch("A and B have different model configurations: their logits cannot be compared")
        folder = next((each.path for each in pair if each.manifest is None), checkpoint)
        tokenizer = None if folder is None else Tokenizer.load(folder)
        pairs = parity_pairs(pair[0].config, tokenizer, texts, num_images, images)
        with progress_bars(remarks, transient=True) as bars:
            logits = scored(pair[0].load(kind, len(pairs.pixels), device), pairs, bars)
            thresholds = _thresholds(pair[1], {"top1": top1, "tau": tau, "max_error": max_error})
            report = report_on(pair[1].load(kind, len(pairs.pixels), device), logits, pairs, thresholds, bars)
        print(report.model_dump_json())
        require_agreement(report, reference)
    except (CheckpointError, EngineError, PackageMissing) as error:
        _end(str(error))


def _thresholds(subject: Subject, asked: dict[str, float | None]) -> Thresholds:
    precision = "fp32" if subject.manifest is None else subject.manifest.options.precision
    given = {name: number for name, number in asked.items() if number is not None}
    try:
        return Thresholds(**(THRESHOLDS[precision].model_dump() | given))
    except ValidationError as error:
        raise typer.BadParameter(first_problem(error)) from error


def _end(sentence: str) -> NoReturn:
    remarks.print(sentence)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
