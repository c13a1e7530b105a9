"""`python -m edje.evaluate CHECKPOINT --data FILE`: the published protocol, before and after reranking.

Prints tables and, as the last line, one JSON document to standard output; progress and remarks to standard error. Exit
status: 0, 1 with a sentence if checkpoint, data or scorer cannot be used, 2 for an invalid command line.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from edje.calibration import Direction
from edje.checkpoint import CheckpointError
from edje.data.dataset import DataError, Split
from edje.data.spec import open_dataset
from edje.evaluation.bootstrap import NUM_RESAMPLES
from edje.evaluation.comparison import evaluate_depths
from edje.evaluation.data_file import read_data_spec
from edje.evaluation.encoded_split import CHECKPOINT_FIRST_STAGE, EncodedSplit, encode_split
from edje.evaluation.errors import EvaluationError, ScorerUnknown
from edje.evaluation.protocol import Scorer
from edje.evaluation.report import Report, Result, print_report, to_json, to_markdown
from edje.evaluation.scorers import check_scorer_name, cost_of_scorer, make_scorer, scores_pairs_independently
from edje.evaluation.storage import Storage
from edje.evaluation.task import RetrievalTask, image_to_text, refuse_depth, text_to_image
from edje.features.storage import FeaturesError
from edje.optional import PackageMissing
from edje.progress import progress_bars

DIRECTIONS: tuple[Direction, ...] = ("text-to-image", "image-to-text")

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def evaluate_split(
    encoded: EncodedSplit,
    scorer_name: str,
    directions: tuple[Direction, ...],
    depths: list[int],
    *,
    num_resamples: int,
    seed: int,
    bars: Progress,
    num_captions: int | None = None,
) -> Report:
    """Evaluate one scorer in these directions at these k. Raises `EvaluationError`.

    `num_captions` limits the queries of text-to-image; the candidates are always all images, and all captions.
    """
    asked = _evenly(len(encoded.captions), num_captions)
    results = []
    for direction in directions:
        task, scorer = _task(encoded, scorer_name, direction, asked)
        # The scores of a cascade depend on the whole list, so each k is scored separately.
        for ks in [depths] if scores_pairs_independently(scorer_name) else [[k] for k in depths]:
            bar = bars.add_task(f"{direction}, k = {max(ks)}", total=task.num_queries)
            advance = partial(bars.advance, bar)
            comparisons = evaluate_depths(task, scorer, ks, num_resamples=num_resamples, seed=seed, on_progress=advance)
            results += [Result(each, cost_of_scorer(scorer_name, encoded, each.k)) for each in comparisons]
    stored = encoded.stored
    num_captions = len(encoded.captions)
    part = "" if len(asked) == num_captions else f", {len(asked):,} of {num_captions:,} captions asked"
    return Report(
        checkpoint=str(encoded.checkpoint),
        model_digest=encoded.model_digest,
        trained=encoded.trained,
        data=f"{encoded.data}{part}",
        split=encoded.split,
        first_stage=encoded.first_stage,
        scorer=scorer_name,
        storage=stored.storage,
        num_visual_tokens=int(stored.tokens.shape[1]),
        payload_bytes_per_image=stored.payload_bytes_per_image,
        blob_bytes_per_image=stored.blob_bytes_per_image,
        seed=seed,
        num_resamples=num_resamples,
        results=tuple(results),
    )


def _task(
    encoded: EncodedSplit, scorer_name: str, direction: Direction, asked: NDArray[np.int64]
) -> tuple[RetrievalTask, Scorer]:
    """The task of a direction, and a scorer of its (query, candidate) pairs."""
    scorer = make_scorer(scorer_name, encoded, direction)
    if direction == "image-to-text":
        return image_to_text(encoded.similarity, encoded.image_of_caption, encoded.group_of_image), scorer
    similarity, images = encoded.similarity[asked], encoded.image_of_caption[asked]

    def of_asked(queries: NDArray[np.int64], candidates: NDArray[np.int64]) -> NDArray[np.float32]:
        return scorer(asked[queries], candidates)

    return text_to_image(similarity, images, encoded.group_of_image), of_asked


def _evenly(num_all: int, num_wanted: int | None) -> NDArray[np.int64]:
    """`num_wanted` evenly spaced numbers below `num_all`; all of them if None or more are wanted."""
    num = num_all if num_wanted is None else min(num_wanted, num_all)
    return np.arange(num) * num_all // num


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the model to evaluate.")],
    data: Annotated[Path, typer.Option(help="TOML file that describes the dataset: a recipe, or its table `data`.")],
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
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = NUM_RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
) -> None:
    """Recall, MRR and nDCG before and after reranking, with 95 % intervals over images."""
    try:
        check_scorer_name(scorer)
    except ScorerUnknown as error:
        raise typer.BadParameter(str(error), param_hint="--scorer") from error
    for path in (out, markdown):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{path} cannot be written: its folder is missing, or it is a folder")
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
    print_report(report, Console(highlight=False, markup=False))
    print(document)


def _fail(sentence: str) -> NoReturn:
    remarks.print(sentence)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
