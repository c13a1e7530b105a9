"""`python -m edje.evaluate CHECKPOINT --data FILE`: the published protocol, first stage and reranked side by side.

Tables and, as the last line, one JSON document go to standard output; progress and remarks to standard error. Ends
with 0, with 1 and a sentence if checkpoint, data or scorer cannot be used, with 2 if the command makes no sense.
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

from edje.checkpoint import CheckpointError
from edje.data.dataset import DataError, Split
from edje.data.spec import open_dataset
from edje.evaluation.bootstrap import NUM_RESAMPLES
from edje.evaluation.comparison import evaluate_depths
from edje.evaluation.data_file import read_data_spec
from edje.evaluation.errors import EvaluationError, ScorerUnknown
from edje.evaluation.protocol import Scorer
from edje.evaluation.report import Report, Result, print_report, to_json, to_markdown
from edje.evaluation.scorers import check_scorer_name, cost_of_scorer, is_of_pairs_alone, make_scorer
from edje.evaluation.storage import Storage
from edje.evaluation.subject import OWN, Subject, load_subject
from edje.evaluation.task import Direction, RetrievalTask, image_to_text, refuse_depth, text_to_image
from edje.features.storage import FeaturesError
from edje.optional import PackageMissing
from edje.progress import progress_bars

DIRECTIONS: tuple[Direction, ...] = ("text-to-image", "image-to-text")

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def evaluate_subject(
    subject: Subject,
    scorer_name: str,
    directions: tuple[Direction, ...],
    depths: list[int],
    *,
    num_resamples: int,
    seed: int,
    bars: Progress,
    num_captions: int | None = None,
) -> Report:
    """Judge one scorer of a subject in these directions at these k. Raises `EvaluationError`.

    With `num_captions`, only so many captions are queries of text-to-image; whatever is searched stays whole.
    """
    asked = _evenly(len(subject.captions), num_captions)
    results = []
    for direction in directions:
        task, scorer = _task(subject, scorer_name, direction, asked)
        # What may depend on the whole list, as a cascade does, is scored anew for each k.
        for ks in [depths] if is_of_pairs_alone(scorer_name) else [[k] for k in depths]:
            bar = bars.add_task(f"{direction}, k = {max(ks)}", total=task.num_queries)
            advance = partial(bars.advance, bar)
            comparisons = evaluate_depths(task, scorer, ks, num_resamples=num_resamples, seed=seed, on_progress=advance)
            results += [Result(each, cost_of_scorer(scorer_name, subject, each.k)) for each in comparisons]
    stored = subject.stored
    num_captions = len(subject.captions)
    part = "" if len(asked) == num_captions else f", {len(asked):,} of {num_captions:,} captions asked"
    return Report(
        checkpoint=str(subject.checkpoint),
        model_digest=subject.model_digest,
        trained=subject.trained,
        data=f"{subject.data}{part}",
        split=subject.split,
        first_stage=subject.first_stage,
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
    subject: Subject, scorer_name: str, direction: Direction, asked: NDArray[np.int64]
) -> tuple[RetrievalTask, Scorer]:
    """What is searched, and the scorer that takes the numbers of its queries and candidates."""
    scorer = make_scorer(scorer_name, subject, direction)
    if direction == "image-to-text":
        return image_to_text(subject.similarity, subject.image_of_caption, subject.group_of_image), scorer
    similarity, images = subject.similarity[asked], subject.image_of_caption[asked]

    def of_asked(queries: NDArray[np.int64], candidates: NDArray[np.int64]) -> NDArray[np.float32]:
        return scorer(asked[queries], candidates)

    return text_to_image(similarity, images, subject.group_of_image), of_asked


def _evenly(num_all: int, num_wanted: int | None) -> NDArray[np.int64]:
    """So many numbers below `num_all`, evenly spaced; all of them where nothing or too much is wanted."""
    num = num_all if num_wanted is None else min(num_wanted, num_all)
    return np.arange(num) * num_all // num


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the model to judge.")],
    data: Annotated[Path, typer.Option(help="TOML file that names the dataset: a recipe, or its table `data`.")],
    split: Annotated[Split, typer.Option(help="Which part of it.")] = "test",
    k: Annotated[list[int] | None, typer.Option(min=1, help="Candidates to rerank; may be repeated. Else 10.")] = None,
    direction: Annotated[
        Literal["both", "text-to-image", "image-to-text"], typer.Option(help="Who is the query.")
    ] = "both",
    storage: Annotated[
        Storage, typer.Option(help="How visual tokens are stored; none: the model's own float32, for comparison.")
    ] = "int8",
    scorer: Annotated[
        str,
        typer.Option(help="torch, maxsim, cascade:BUDGET, or package.module:factory, called with the subject."),
    ] = "torch",
    first_stage: Annotated[
        str,
        typer.Option(help="checkpoint: its own; maxsim; or a .npy file of (captions, images) similarities."),
    ] = OWN,
    captions: Annotated[
        int | None,
        typer.Option(min=1, help="Ask with so many captions only, evenly spaced; all images stay candidates."),
    ] = None,
    features: Annotated[Path, typer.Option(help="Folder for what the tower sees; shared with training.")] = Path(
        "build/features"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = NUM_RESAMPLES,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables here.")] = None,
) -> None:
    """Recall, MRR and nDCG before and after reranking, with 95 % intervals over images."""
    try:
        check_scorer_name(scorer)
    except ScorerUnknown as error:
        raise typer.BadParameter(str(error), param_hint="--scorer") from error
    for path in (out, markdown):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise typer.BadParameter(f"{path} cannot be written: its folder is missing, or it is one itself")
    depths = sorted({*(k or [10])})
    directions = DIRECTIONS if direction == "both" else (direction,)
    try:
        dataset = open_dataset(read_data_spec(data), split, strict=True)
        for each in directions:  # before anything is computed
            refuse_depth(max(depths), len(dataset.images) if each == "text-to-image" else dataset.num_captions)
        subject = load_subject(
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
            report = evaluate_subject(
                subject,
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
