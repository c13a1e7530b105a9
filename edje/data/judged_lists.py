"""Reads judged or clicked candidate lists as training data: queries with positive and negative images.

The format is that of `edje.data.candidate_lists`. A label above 0 makes the text a caption of the image. All other
candidates, also those without a label, are negatives of the query. Scores are the teacher's.
"""

from __future__ import annotations

from pathlib import Path

from edje.data.candidate_lists import CandidateList, JudgedCandidate, read_candidate_lists
from edje.data.caption_table import hashed_split
from edje.data.dataset import Dataset, Split
from edje.data.image_files import DatasetBuilder


def judged_lists(
    lists_path: Path,
    image_root: Path,
    split: Split,
    *,
    dev_share: float = 0.1,
    test_share: float = 0.1,
    leave_out: Path | None = None,
    strict: bool = False,
) -> Dataset:
    """One split of the lists, divided by a hash of the query.

    Raises `DataError`. A faulty list is counted and left out, or raises `DataError` if `strict`.
    """
    builder = DatasetBuilder(f"{lists_path.stem} {split}", image_root, leave_out)
    is_taken: dict[str, bool] = {}
    for each in read_candidate_lists(lists_path, problems=builder.problems):
        if hashed_split(each.query, dev_share, test_share) != split:
            continue
        location = f"{lists_path.name} line {each.line}"
        if not any(candidate.label for candidate in each.candidates):
            builder.problems.record("no_positive", each.query, location)
            continue
        for candidate in each.candidates:
            text, image = _pair(each, candidate)
            if image not in is_taken:
                is_taken[image] = builder.add_image(image, image, location)
            if is_taken[image]:
                builder.add_judged(image, text, is_positive=bool(candidate.label), score=candidate.score)
    return builder.finish(strict=strict)


def _pair(each: CandidateList, candidate: JudgedCandidate) -> tuple[str, str]:
    """Text and image of a candidate."""
    if each.direction == "text-to-image":
        return each.query, candidate.content
    return candidate.content, each.query
