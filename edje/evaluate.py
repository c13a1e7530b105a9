"""`python -m edje.evaluate CHECKPOINT --data FILE`: the published protocol, before and after reranking.

With `--lists FILE --images FOLDER` instead of `--data`, it evaluates reranking of the user's own first stage: fixed
candidate lists with scores and labels (`edje.data.candidate_lists`).

Prints tables and, as the last line, one JSON document to standard output; progress and remarks to standard error. The
exit status is 0, 1 with a message if checkpoint, data or scorer cannot be used, or 2 for an invalid command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from edje.calibration import Direction
from edje.checkpoint import CheckpointError
from edje.data.candidate_lists import read_candidate_lists
from edje.data.dataset import DataError, Split
from edje.data.spec import open_dataset
from edje.evaluation.bootstrap import NUM_RESAMPLES
from edje.evaluation.data_file import read_data_spec
from edje.evaluation.encoded_split import CHECKPOINT_FIRST_STAGE, encode_split
from edje.evaluation.errors import EvaluationError, PlotImpossible, ScorerUnknown
from edje.evaluation.judged_lists import ListsReport, evaluate_lists
from edje.evaluation.list_ranking import rank_lists
from edje.evaluation.plots import reliability_diagram
from edje.evaluation.reliability import Reliability
from edje.evaluation.report import Report, print_report, to_json, to_markdown
from edje.evaluation.scorers import FULL, check_scorer_name
from edje.evaluation.service_ranking import rank_through_service
from edje.evaluation.split_evaluation import evaluate_split
from edje.evaluation.storage import Storage
from edje.evaluation.task import refuse_depth
from edje.features.storage import FeaturesError
from edje.model.weights import load_checkpoint
from edje.optional import PackageMissing
from edje.progress import progress_bars

DIRECTIONS: tuple[Direction, ...] = ("text-to-image", "image-to-text")

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def main(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of the model to evaluate; none with --through-service.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="TOML file that describes the dataset: a recipe, or its table `data`.")
    ] = None,
    lists: Annotated[
        Path | None, typer.Option(help="In place of --data: candidate lists of your first stage, as JSON lines.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="With --lists: the folder of the images.")] = None,
    through_service: Annotated[
        bool,
        typer.Option(
            "--through-service", help="With --lists: rank by the running service; names of images are their ids."
        ),
    ] = False,
    split: Annotated[Split, typer.Option(help="The split to evaluate.")] = "test",
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="Candidates to rerank; may be repeated. Default: 10.")
    ] = None,
    direction: Annotated[
        Literal["both", "text-to-image", "image-to-text"],
        typer.Option(help="The kind of query: a text that searches images, or an image that searches texts."),
    ] = "both",
    storage: Annotated[
        Storage, typer.Option(help="Storage type of the visual tokens; none: the model's float32, for comparison.")
    ] = "int8",
    scorer: Annotated[
        str,
        typer.Option(help="torch, maxsim, cascade:BUDGET, or package.module:factory, called with the encoded split."),
    ] = "torch",
    first_stage: Annotated[
        str,
        typer.Option(help="checkpoint: the one it holds; maxsim; or a .npy file of (captions, images) similarities."),
    ] = CHECKPOINT_FIRST_STAGE,
    captions: Annotated[
        int | None,
        typer.Option(min=1, help="Number of captions to use as queries, evenly spaced; all images stay candidates."),
    ] = None,
    features: Annotated[Path, typer.Option(help="Folder of the tower's features; shared with training.")] = Path(
        "build/features"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    resamples: Annotated[int, typer.Option(min=1, help="Number of bootstrap resamples.")] = NUM_RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
    diagram: Annotated[
        Path | None, typer.Option(help="Also draw the reliability diagram, as .svg or .png; for torch and factories.")
    ] = None,
) -> None:
    """Report recall, MRR and nDCG before and after reranking, and the calibration of scores, with 95 % intervals."""
    try:
        check_scorer_name(scorer)
    except ScorerUnknown as error:
        raise typer.BadParameter(str(error), param_hint="--scorer") from error
    for path in (out, markdown, diagram):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{path} cannot be written: its folder is missing, or it is a folder")
    if (data is None) == (lists is None):
        raise typer.BadParameter("give either --data or --lists")
    if lists is not None:
        if through_service == (checkpoint is not None and images is not None):
            raise typer.BadParameter(
                "--lists needs either a checkpoint and --images, the folder of the images, or --through-service"
            )
        if scorer != FULL or diagram is not None or captions is not None or k:
            raise typer.BadParameter("--scorer, --diagram, --captions and --k belong to --data, not to --lists")
        _evaluate_lists(
            checkpoint, lists, images, storage, features, device, num_resamples=resamples, seed=seed,
            out=out, markdown=markdown,
        )  # fmt: skip
        return
    if checkpoint is None or data is None or through_service:
        raise typer.BadParameter("--data needs a checkpoint, and --through-service belongs to --lists")
    depths = sorted({*(k or [10])})
    directions = DIRECTIONS if direction == "both" else (direction,)
    try:
        dataset = open_dataset(read_data_spec(data), split, strict=True)
        for each in directions:  # before anything is computed
            refuse_depth(max(depths), len(dataset.images) if each == "text-to-image" else dataset.num_captions)
        encoded = encode_split(
            checkpoint,
            dataset,
            split,
            storage,
            features=features,
            first_stage=first_stage,
            device=device,
            console=remarks,
        )
        with progress_bars(remarks) as bars:
            report = evaluate_split(
                encoded,
                scorer,
                directions,
                depths,
                num_resamples=resamples,
                seed=seed,
                bars=bars,
                num_captions=captions,
            )
    except (EvaluationError, CheckpointError, DataError, FeaturesError, PackageMissing) as error:
        _fail(str(error))
    if not report.trained:
        remarks.print("this checkpoint is UNTRAINED: its scores mean nothing")
    document = to_json(report)
    if out is not None:
        out.write_text(document + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(to_markdown(report), encoding="utf-8")
    if diagram is not None:
        _draw(report, diagram)
    print_report(report, Console(highlight=False, markup=False))
    print(document)


def _evaluate_lists(
    checkpoint: Path | None,
    path: Path,
    images: Path | None,
    storage: Storage,
    features: Path,
    device: str,
    *,
    num_resamples: int,
    seed: int,
    out: Path | None,
    markdown: Path | None,
) -> None:
    """Rank the lists of a file with the checkpoint or the running service, and report metrics before and after."""
    try:
        lists = list(read_candidate_lists(path))
        if not lists:
            raise DataError(f"{path} holds no candidate list")
        calibration = None
        if checkpoint is None or images is None:
            orders, digest = rank_through_service(lists)
            name = f"the running service, model {digest}"
        else:
            loaded = load_checkpoint(checkpoint)
            calibration, name = loaded.config.calibration, f"{checkpoint}, model {loaded.digest}"
            if not loaded.config.trained:
                remarks.print("this checkpoint is UNTRAINED: its scores mean nothing")
            orders = rank_lists(
                checkpoint, loaded, lists, images, storage, features=features, device=device, console=remarks
            )
        results = evaluate_lists(lists, orders, num_resamples=num_resamples, seed=seed)
    except (EvaluationError, CheckpointError, DataError, FeaturesError, PackageMissing) as error:
        _fail(str(error))
    report = ListsReport(name, checkpoint is None, calibration, str(path), num_resamples, seed, results)
    if out is not None:
        out.write_text(report.to_json() + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(to_markdown(report), encoding="utf-8")
    print_report(report, Console(highlight=False, markup=False))
    print(report.to_json())


def _draw(report: Report, path: Path) -> None:
    """Draw the reliability of every direction at its largest k."""
    curves: dict[str, Reliability] = {
        result.comparison.direction: result.reliability for result in report.results if result.reliability is not None
    }
    try:
        reliability_diagram(curves, path, title=f"{report.checkpoint}, {report.data}")
    except PlotImpossible as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    remarks.print(sentence)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
