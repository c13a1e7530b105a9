"""Progress bars of the command lines, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def progress_bars(console: Console | None = None, *, transient: bool = False, enabled: bool = True) -> Progress:
    """Bars with a title, a count, the elapsed and the remaining time; a context manager.

    Args:
        console: where to draw; standard error by default.
        transient: whether the bars vanish at the end.
        enabled: False draws nothing, for processes that only take part.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=transient,
        disable=not enabled,
    )


def track(items: Iterable[T], title: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yield the items and show one bar meanwhile."""
    with progress_bars(enabled=enabled) as bars:
        yield from bars.track(items, total=total, description=title)
