"""Reads judged candidate lists: what a first stage found for each query, with its scores and, if known, labels.

One JSON object per line. A text that searches images, and an image that searches texts:

    {"query": "a dog on a beach", "candidates": [{"image": "1.jpg", "score": 0.31, "label": 1}, {"image": "2.jpg"}]}
    {"query": {"image": "1.jpg"}, "candidates": [{"text": "a dog", "score": 0.4, "label": 1}, {"text": "a cat"}]}

Candidates are in the first stage's order, best first. `score` is on any scale, higher is better. `label` is the
relevance of the candidate, 0 for an irrelevant one. Unknown fields are ignored. The reader opens no image; the caller
decides whether a name is a file name or an id.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from edje.calibration import Direction
from edje.data.dataset import DataError, Problems
from protocols.validation import first_problem

#: Limits before parsing: a line of a million candidates is a mistake, not a list to rerank.
MAX_LINE_BYTES = 16_000_000
MAX_CANDIDATES = 100_000

_Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


@dataclass(frozen=True, slots=True)
class JudgedCandidate:
    """One candidate: an image's name or a text."""

    content: str
    score: float | None  # the first stage's; None where it is missing
    label: float | None  # None: not judged


@dataclass(frozen=True, slots=True)
class CandidateList:
    """One query and its candidates in the first stage's order."""

    direction: Direction
    query: str  # a text, or an image's name
    candidates: tuple[JudgedCandidate, ...]
    line: int  # in the file, from 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class _Content(_Part):
    text: _Name | None = None
    image: _Name | None = None


class _Candidate(_Content):
    score: float | None = None
    label: Annotated[float, Field(ge=0, allow_inf_nan=False)] | bool | None = None


class _Line(_Part):
    query: _Name | _Content
    candidates: Annotated[list[_Candidate], Field(min_length=1, max_length=MAX_CANDIDATES)]


def read_candidate_lists(path: Path, *, problems: Problems | None = None) -> Iterator[CandidateList]:
    """The lists of a file, in its order; empty lines are skipped.

    Raises `DataError` with the line number for the first faulty line. With `problems`, faulty lines are counted there
    as `bad_row` and left out. A file that cannot be read is a `DataError` in any case.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                too_long = len(raw) > MAX_LINE_BYTES
                if too_long:
                    _skip_line(file, raw)
                elif not raw.strip():
                    continue
                try:
                    if too_long:
                        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
                    yield _parsed(raw, number)
                except ValueError as error:
                    if problems is None:
                        raise DataError(f"{path}, line {number}: {error}") from error
                    problems.record("bad_row", str(error), f"{path.name} line {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _skip_line(file: BinaryIO, start: bytes) -> None:
    """Read the rest of a line after its first part, `start`."""
    while start and not start.endswith(b"\n"):
        start = file.readline(MAX_LINE_BYTES)


def _parsed(raw: bytes, number: int) -> CandidateList:
    """One line as a list. Raises `ValueError` with a sentence about the first fault."""
    try:
        line = _Line.model_validate_json(raw)
    except ValidationError as error:
        raise ValueError(first_problem(error, root="the object")) from error
    query = _Content(text=line.query) if isinstance(line.query, str) else line.query
    if (query.text is None) == (query.image is None):
        raise ValueError("query: give a text or an image, and not both")
    direction: Direction = "text-to-image" if query.text is not None else "image-to-text"
    wanted = "image" if direction == "text-to-image" else "text"
    candidates = []
    for index, candidate in enumerate(line.candidates):
        content = candidate.image if direction == "text-to-image" else candidate.text
        if content is None or (candidate.image is None) == (candidate.text is None):
            raise ValueError(
                f"candidates.{index}: the candidates of a {direction} query have the field {wanted!r} alone"
            )
        score = None if candidate.score is None or not math.isfinite(candidate.score) else candidate.score
        label = None if candidate.label is None else float(candidate.label)
        candidates.append(JudgedCandidate(content, score, label))
    return CandidateList(direction, query.text or query.image or "", tuple(candidates), number)
