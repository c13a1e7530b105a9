"""Validates a model after a phase: text-to-image recall on captions of the dev split."""

from __future__ import annotations

from edje.evaluation.comparison import evaluate
from edje.training.dev_retrieval import DevSearch


def validate(search: DevSearch) -> dict[str, float]:
    """R@1 of the first stage, after reranking, and of the late interaction alone where the model has one."""
    scorers = search.scorers
    reranked = evaluate(search.task, scorers.joint(search.similarity), search.k, num_resamples=2).row("R@1")
    metrics = {"first_stage_r1": reranked.first_stage.value, "reranked_r1": reranked.reranked.value}
    if scorers.has_late_interaction:
        late = evaluate(search.task, scorers.late_interaction(), search.k, num_resamples=2)
        metrics["late_interaction_r1"] = late.row("R@1").reranked.value
    return metrics
