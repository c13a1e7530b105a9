"""`python -m edje.recipe_reference`: print every field of a recipe with type, default and meaning, as Markdown.

The descriptions of the fields are the source; a field without one is an error.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Union

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from edje.recipe import Recipe

_TYPE_NAMES: Final[dict[Any, str]] = {bool: "true or false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True, slots=True)
class RecipeField:
    """One field: its name within its table, and the cells of its row."""

    name: str
    type_name: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class RecipeTable:
    """One table of a recipe: the heading as written in TOML, what it describes, and its fields."""

    heading: str
    summary: str
    fields: tuple[RecipeField, ...]


def tables() -> list[RecipeTable]:
    """Every table of a recipe, in the order of its fields. Raises `ValueError` for a field without a meaning."""
    return list(_tables(Recipe, "", set()))


def markdown() -> str:
    """The reference as Markdown."""
    lines = []
    for table in tables():
        lines += [f"### {table.heading}", "", table.summary, "", "| field | type | default | meaning |"]
        lines += ["|---|---|---|---|"]
        lines += [f"| `{each.name}` | {each.type_name} | {each.default} | {each.meaning} |" for each in table.fields]
        lines += [""]
    return "\n".join(lines)


def _tables(kind: type, path: str, shown: set[type]) -> Iterator[RecipeTable]:
    """The table of this type, then those within it that are not yet in `shown`."""
    shown.add(kind)
    fields, inner = [], list[tuple[type, str]]()
    for name, field in _fields(kind):
        if not field.description:
            raise ValueError(f"the field {kind.__name__}.{name} has no description")
        nested = _nested(field.annotation)
        inner += [(each, f"{path}.{name}" if path else name) for each in nested]
        default = "" if nested and isinstance(field.default, BaseModel) else _default(field)
        fields.append(RecipeField(name, _escaped(_type_name(field.annotation)), _escaped(default), field.description))
    yield RecipeTable(_heading(kind, path), _summary(kind), tuple(fields))
    for each, inner_path in inner:
        if each not in shown:
            yield from _tables(each, inner_path, shown)


def _fields(kind: type) -> Iterator[tuple[str, FieldInfo]]:
    if issubclass(kind, BaseModel):
        yield from kind.model_fields.items()
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]  # `_nested` finds no other types
        default = PydanticUndefined if each.default is dataclasses.MISSING else each.default
        field = FieldInfo.from_annotation(hints[each.name])
        field.default = default
        yield each.name, field


def _nested(annotation: Any) -> list[type]:
    """The tables within a type."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [each for argument in typing.get_args(annotation) for each in _nested(argument)]


def _heading(kind: type, path: str) -> str:
    if not path:
        return "Top level"
    brackets = "[[phase]]" if path == "phase" else f"[{path}]"
    kinds = [values for name, field in _fields(kind) if name == "kind" and (values := _literals(field.annotation))]
    choice = f', `kind = "{kinds[0][0]}"`' if kinds and len(kinds[0]) == 1 and path.startswith("data") else ""
    return f"`{brackets}`{choice}"


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in arguments)
    if origin in (Union, types.UnionType):
        names = [_type_name(each) for each in arguments if each is not type(None)]
        return " or ".join(dict.fromkeys(names))
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"table of {_type_name(arguments[1])} by {_type_name(arguments[0])}"
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    return "table" if _nested(annotation) else "path"


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`{list(value)!r}`".replace("'", '"')
    return f"`{value!r}`".replace("'", '"')


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown())  # the command's output
