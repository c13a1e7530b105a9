"""Turns pydantic's errors into sentences for people.

A sentence names the field and what is wrong with it, and never repeats the value, which may be long or secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError

#: Limit for each part of a field's path, because keys of a mapping come from the input and may be long.
_MAX_PART_CHARS = 50


def problems_in(
    error: ValidationError, *, root: str = "", names: Mapping[str, str] | None = None, limit: int | None = None
) -> Sequence[str]:
    """Return `<field>: <problem>` for each problem, at most `limit` of them.

    `root` is the name of the whole value, for a problem that belongs to no field. `names` replaces the names of
    top-level fields.
    """
    details = error.errors(include_url=False, include_input=False, include_context=False)
    return [_sentence(detail["loc"], detail["msg"], root, names or {}) for detail in details[:limit]]


def first_problem(error: ValidationError, *, root: str = "") -> str:
    """Return the first of `problems_in(error, root=root)`."""
    return problems_in(error, root=root, limit=1)[0]


def _sentence(path: tuple[int | str, ...], message: str, root: str, names: Mapping[str, str]) -> str:
    parts = [str(part) for part in path]
    if parts:
        parts[0] = names.get(parts[0], parts[0])
    field = ".".join(part[:_MAX_PART_CHARS] for part in parts) or root
    problem = message.removeprefix("Value error, ")
    return f"{field}: {problem}" if field else problem
