"""Evaluates one scorer on an encoded split: rankings before and after, probabilities, and requests without scores."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from edje.calibration import Direction, DirectionCalibration
from edje.evaluation.comparison import compare
from edje.evaluation.encoded_split import EncodedSplit
from edje.evaluation.protocol import FirstStage, Scorer, first_stage, score_top
from edje.evaluation.reliability import reliability
from edje.evaluation.report import Report, Result
from edje.evaluation.scorers import (
    CalibratedScorer,
    cost_of_scorer,
    make_scorer,
    returns_log_odds,
    scores_pairs_independently,
)
from edje.evaluation.task import RetrievalTask, image_to_text, text_to_image
from edje.first_stage_scores import of_ranks


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
    queries = evenly_spaced(len(encoded.captions), num_captions)
    results = []
    for direction in directions:
        task = _task(encoded, direction, queries)
        # The scores of a cascade depend on the whole list, so each k is scored separately.
        for ks in [depths] if scores_pairs_independently(scorer_name) else [[k] for k in depths]:
            best = first_stage(task, max(ks))
            scorer = _scorer(encoded, scorer_name, direction, queries, best)
            bar = bars.add_task(f"{direction}, k = {max(ks)}", total=task.num_queries)
            scores = score_top(scorer, best.top, on_progress=partial(bars.advance, bar))
            for k in ks:
                results.append(_result(encoded, scorer_name, task, best, scores[:, :k], num_resamples, seed))
    stored = encoded.stored
    num_captions = len(encoded.captions)
    part = "" if len(queries) == num_captions else f", {len(queries):,} of {num_captions:,} captions as queries"
    return Report(
        checkpoint=str(encoded.checkpoint),
        model_digest=encoded.model_digest,
        trained=encoded.trained,
        calibration=encoded.calibration,
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


def _result(
    encoded: EncodedSplit,
    scorer_name: str,
    task: RetrievalTask,
    best: FirstStage,
    scores: NDArray[np.float32],
    num_resamples: int,
    seed: int,
) -> Result:
    """The result at one k from `(queries, k)` scores."""
    k = scores.shape[1]
    comparison = compare(task, best, scores, num_resamples=num_resamples, seed=seed)
    cost = cost_of_scorer(scorer_name, encoded, k)
    if not returns_log_odds(scorer_name):
        return Result(comparison, cost)
    positives = task.is_positive(best.top[:, :k])
    constants = None if encoded.calibration is None else encoded.calibration.of(task.direction)
    shuffled = None
    if constants is not None and constants.first_stage_gain:
        without = without_scores(scores, constants, seed)
        shuffled = compare(task, best, without, num_resamples=num_resamples, seed=seed)
    return Result(
        comparison,
        cost,
        reliability(scores, positives, task.cluster, num_resamples=num_resamples, seed=seed),
        shuffled,
    )


def without_scores(log_odds: NDArray[np.float32], constants: DirectionCalibration, seed: int) -> NDArray[np.float32]:
    """`(queries, k)` log-odds as if each query's candidates came in random order and without scores."""
    ranks = np.arange(1, log_odds.shape[1] + 1)
    random = np.random.default_rng(seed).permuted(np.broadcast_to(ranks, log_odds.shape), axis=1)
    difference = of_ranks(random) - of_ranks(ranks)
    changed: NDArray[np.float32] = log_odds + constants.first_stage_gain / constants.temperature * difference
    return changed.astype(np.float32)


def _task(encoded: EncodedSplit, direction: Direction, queries: NDArray[np.int64]) -> RetrievalTask:
    """The task of a direction; `queries` are the captions that are queries of text-to-image."""
    if direction == "image-to-text":
        return image_to_text(encoded.similarity, encoded.image_of_caption, encoded.group_of_image)
    return text_to_image(encoded.similarity[queries], encoded.image_of_caption[queries], encoded.group_of_image)


def _scorer(
    encoded: EncodedSplit, scorer_name: str, direction: Direction, queries: NDArray[np.int64], best: FirstStage
) -> Scorer:
    """The scorer of a task's (query, candidate) pairs, with the calibration of the checkpoint."""
    constants = None if encoded.calibration is None else encoded.calibration.of(direction)
    if direction == "image-to-text":
        queries = np.arange(len(encoded.image_ids))
    row_of = np.full(queries.max() + 1, -1)
    row_of[queries] = np.arange(len(queries))

    def ranks(query_index: NDArray[np.int64], candidate_index: NDArray[np.int64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (best.top[row_of[query_index]] == candidate_index[:, None]).argmax(axis=1) + 1
        return found

    scorer = make_scorer(scorer_name, encoded, direction, lambda logits: CalibratedScorer(logits, constants, ranks))
    return lambda query_index, candidate_index: scorer(queries[query_index], candidate_index)


def evenly_spaced(num_all: int, num_wanted: int | None) -> NDArray[np.int64]:
    """`num_wanted` evenly spaced numbers below `num_all`; all of them if None or more are wanted."""
    num = num_all if num_wanted is None else min(num_wanted, num_all)
    return np.arange(num) * num_all // num
