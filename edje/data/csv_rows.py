"""Reads the rows of a CSV table with their line numbers. A faulty row does not affect the rows after it.

Knows neither images nor captions.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from edje.data.dataset import DataError

_DELIMITERS: Final = (",", ";", "\t", "|")
#: A quoted field may contain line breaks; a row of more lines has an unclosed quotation mark.
_MAX_LINES_PER_ROW: Final = 50
_MAX_SHOWN_CHARS: Final = 200
_UNCLOSED: Final = "a quotation mark opens a field and does not close it in the same row"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `line` is the number of its first line, from 1."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read, and why."""

    line: int
    cause: str


class CsvTable:
    """A CSV text with a header. The delimiter is a comma, semicolon, tab or bar, whichever gives the needed columns."""

    def __init__(self, path: Path, text: str, required: Sequence[str], optional: Sequence[str]) -> None:
        """Read the header. Column names match in upper and lower case. Raises `DataError`."""
        self._lines = _Lines(text)
        self.columns: tuple[str, ...] = ()
        header = next(self._lines, "")
        while not header.strip() and not self._lines.at_end:
            header = next(self._lines, "")
        if re.fullmatch(r"sep=.", header.strip()):  # a spreadsheet's note on its delimiter
            header = next(self._lines, "")
        for self._delimiter in _DELIMITERS:
            self.columns = tuple(name.strip().casefold() for name in _cells(header, self._delimiter))
            if set(required) <= set(self.columns):
                break
        else:
            raise DataError(
                f"{path} line {self._lines.number}: the header names {_shown(header)}. It must name the columns "
                f"{' and '.join(required)}, and may name {', '.join(optional)}, separated by commas"
            )
        for name in (*required, *optional):
            if self.columns.count(name) > 1:
                raise DataError(
                    f"{path} line {self._lines.number}: the header names the column {name} more than once: rename or "
                    "remove one"
                )

    def rows(self, starts_row: Callable[[dict[str, str]], bool]) -> Iterator[Row | BadRow]:
        """Yield every row that is not blank.

        `starts_row` returns whether the cells of a line are the start of a row. A quoted field that contains such a
        line lacks its closing quotation mark: its first line is a bad row, and the other lines are read as rows.
        """
        for first in self._lines:
            line = self._lines.number
            taken: list[str] = []
            try:
                cells = next(csv.reader(self._fed(first, taken), delimiter=self._delimiter, strict=True), [])
            except csv.Error as error:
                self._lines.put_back(taken)
                yield BadRow(line, _UNCLOSED if taken else _cause(error))
                continue
            if any(starts_row(self._naive(each)) for each in taken):
                self._lines.put_back(taken)
                yield BadRow(line, _UNCLOSED)
            elif not any(map(str.strip, cells)):
                continue
            elif len(cells) != len(self.columns):
                yield BadRow(line, f"{len(cells)} fields where the header names {len(self.columns)}")
            else:
                yield Row(line, dict(zip(self.columns, cells, strict=True)))

    def _fed(self, first: str, taken: list[str]) -> Iterator[str]:
        yield first
        for line in islice(self._lines, _MAX_LINES_PER_ROW - 1):
            taken.append(line)
            yield line

    def _naive(self, line: str) -> dict[str, str]:
        """The cells of a line, quotation marks treated as letters; empty if the line has too few."""
        cells = line.rstrip("\n").split(self._delimiter)
        return {} if len(cells) < len(self.columns) else dict(zip(self.columns, cells, strict=False))


class _Lines(Iterator[str]):
    """Lines of a text with their numbers. Lines can be put back."""

    def __init__(self, text: str) -> None:
        self._rest = io.StringIO(text, newline=None)  # understands every kind of line end
        self._waiting: deque[str] = deque()
        self.number = 0
        self.at_end = not text

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._rest.readline()
        if not line:
            self.at_end = True
            raise StopIteration
        self.number += 1
        return line

    def put_back(self, lines: Sequence[str]) -> None:
        """Make these lines the next lines to be read."""
        self._waiting.extendleft(reversed(lines))
        self.number -= len(lines)


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _cause(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return _UNCLOSED
    if "expected after" in text:
        return "a quoted field contains a single quotation mark: double it"
    if "field larger" in text:
        return f"a field has more than {csv.field_size_limit():,} characters"
    return text


def _shown(line: str) -> str:
    line = line.strip()
    return ascii(line[:_MAX_SHOWN_CHARS]) if line else "nothing"
