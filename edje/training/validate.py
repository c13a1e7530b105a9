"""After a phase: how well the first stage and the reranker find the dev split's images for some of its captions."""

from __future__ import annotations

from edje.evaluation.comparison import evaluate
from edje.training.dev_retrieval import DevSearch


def validate(search: DevSearch) -> dict[str, float]:
    """Recall of text-to-image search: first stage, reranked, and by the late interaction alone where there is one."""
    scorers = search.scorers
    reranked = evaluate(search.task, scorers.joint(search.similarity), search.k, num_resamples=2).row("R@1")
    told = {"first_stage_r1": reranked.first_stage.value, "reranked_r1": reranked.reranked.value}
    if scorers.has_late_interaction:
        late = evaluate(search.task, scorers.late_interaction(), search.k, num_resamples=2)
        told["late_interaction_r1"] = late.row("R@1").reranked.value
    return told
