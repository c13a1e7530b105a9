"""Writes docs/reference/{events,settings,commands,recipe}.md from the code. `--check` only compares.

Run: python docs/generate.py [--check]

The tables of docs/reference/telemetry.md are written by `python -m workers.telemetry.document`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from edje import recipe_reference
from protocols.events import ImageIndexed, ImageNew, RerankRequest, RerankResponse
from protocols.examples import examples
from protocols.topics import Topics
from workers import settings as worker_settings
from workers.gateway.settings import GatewaySettings
from workers.index.settings import IndexSettings
from workers.read_settings import variable_names

REFERENCE = Path(__file__).parent / "reference"
#: Commands with options of their own; the workers take their settings from the environment.
COMMANDS = (
    "workers.publish.__main__",
    "workers.traces.__main__",
    "edje.init",
    "edje.train",
    "edje.evaluate",
    "edje.calibrate",
    "edje.convert",
    "trt.build.__main__",
    "trt.inspect",
    "trt.verify",
)
EVENTS = {
    ImageNew: Topics().images_new,
    ImageIndexed: Topics().images_indexed,
    RerankRequest: Topics().rerank_requests,
    RerankResponse: Topics().rerank_responses,
}
NOTE = "<!-- Written by docs/generate.py; edit the code instead. -->\n\n"


def documents() -> dict[Path, str]:
    """Return the text of each generated page by its path."""
    return {
        REFERENCE / "events.md": events(),
        REFERENCE / "settings.md": settings(),
        REFERENCE / "commands.md": commands(),
        REFERENCE / "recipe.md": recipe(),
    }


def events() -> str:
    """Return the page about the events: one table of fields and one example for each."""
    parts = [
        NOTE + "# Events\n\n"
        "Events are JSON by default, and msgpack when the header `content-type: application/msgpack` says so. "
        "Unknown fields are ignored. The key of a message is its `image_id` or `request_id`. "
        "A message without a value (a tombstone) on `images.new` removes the image with that key.\n\n"
        "For other languages: `deploy/asyncapi.yaml`, and a JSON Schema for each event in `deploy/schemas/`. "
        "What can never succeed goes to `<topic>.dlq` unchanged, with its cause in the headers `dead-letter-*` "
        "([Error codes](errors.md)).\n"
    ]
    for event, topic in EVENTS.items():
        parts.append(f"\n## {topic}\n\n{_first_paragraph(event)}\n\n")
        parts.append(_table(("field", "type", "required", "meaning"), _fields(event)))
        for example in list(examples()[event].values())[:1]:
            text = json.dumps(json.loads(example.model_dump_json(exclude_none=True)), indent=1)
            parts.append(f"\n```json\n{text}\n```\n")
    return "".join(parts)


def _fields(event: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    schema = event.model_json_schema()
    for name, field in event.model_fields.items():
        kind = _type_of(schema["properties"][name], schema)
        yield f"`{name}`", kind, "yes" if field.is_required() else "", field.description or ""


def _type_of(schema: dict[str, Any], root: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"object `{schema['$ref'].rsplit('/', 1)[1]}`"
    if "anyOf" in schema:
        kinds = [_type_of(each, root) for each in schema["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type_of(schema.get('items', {}), root)}"
    return str(schema.get("format") or schema.get("type") or "any")


def settings() -> str:
    """Return the page about the settings: one table for each worker, the shared ones first."""
    kinds = (GatewaySettings, IndexSettings, worker_settings.IngestSettings, worker_settings.RerankSettings)
    general = worker_settings.EngineSettings.model_fields
    shared = set(general)
    parts = [
        NOTE + "# Settings\n\n"
        "Every worker reads its settings from the environment, once, when it starts. "
        "`python -m workers.rerank --show-config` lists the values in use and where each comes from. "
        "An unknown variable with a worker's prefix stops that worker; variables of other programs are ignored.\n\n"
        "## All workers\n\n"
        "The index worker and the gateway have those of these that concern them: no engine, no consumer group for the "
        "gateway.\n\n"
        "Variables without a fixed name carry the worker's prefix, for example `RERANK_DELIVERY`; "
        "the table shows those of the rerank worker.\n\n"
    ]
    rerank = worker_settings.RerankSettings
    parts.append(_table(("variable", "default", "meaning"), _settings_of(rerank, shared)))
    for kind in kinds:
        own = {
            name
            for name, field in kind.model_fields.items()
            if name not in shared or (field.default, field.description) != _meaning_of(general[name])
        }
        title = kind.__name__.removesuffix("Settings").lower()
        parts.append(f"\n## {title}\n\n")
        parts.append(_table(("variable", "default", "meaning"), _settings_of(kind, own)))
    return "".join(parts)


def _meaning_of(field: FieldInfo) -> tuple[Any, str | None]:
    return field.default, field.description


def _settings_of(kind: type[BaseSettings], fields: set[str]) -> Iterator[tuple[str, str, str]]:
    names = variable_names(kind)
    for name, field in kind.model_fields.items():
        if name in fields:
            yield f"`{names[name]}`", _default(field.default), field.description or ""


def _default(value: object) -> str:
    match value:
        case None:
            return ""
        case _ if value is PydanticUndefined:
            return "required"
        case tuple():
            return f"`{','.join(map(str, value))}`" if value else ""
        case bool():
            return f"`{str(value).lower()}`"
        case _:
            secret = getattr(value, "get_secret_value", None)
            text = str(secret() if secret else value)
            return f"`{text}`" if text else ""


def recipe() -> str:
    """Return the page about the fields of a recipe."""
    head = (
        "# Recipe fields\n\n"
        "A recipe is one TOML file with everything that a training run depends on; examples are in `edje/recipes/`. "
        "`--set path.to.name=value` changes any field on the command line; a phase is addressed by its index "
        "(`phase.0.epochs=2`).\n\n"
    )
    return NOTE + head + recipe_reference.markdown().replace("\n### ", "\n## ").removeprefix("#")


def commands() -> str:
    """Return the page about the commands: arguments and options of each."""
    parts = [
        NOTE + "# Commands\n\n"
        "The workers (`python -m workers.ingest`, `workers.rerank`, `workers.index`, `workers.gateway`) take "
        "`--show-config`; everything else comes from [the environment](settings.md).\n"
    ]
    for module in COMMANDS:
        command = _command_of(module)
        name = f"python -m {module.removesuffix('.__main__')}"
        children = getattr(command, "commands", None) or {"": command}
        for child_name, child in children.items():
            parts.append(f"\n## `{f'{name} {child_name}'.strip()}`\n\n{_paragraphs(child.help)}\n\n")
            parts.append(_table(("argument or option", "default", "meaning"), _parameters(child)))
    return "".join(parts)


def _command_of(module: str) -> Any:
    imported = importlib.import_module(module)
    app = getattr(imported, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False)
        app.command()(imported.main)
    return typer.main.get_command(app)


def _parameters(command: Any) -> Iterator[tuple[str, str, str]]:
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            name = f"`{(parameter.metavar or parameter.name or '').strip('{}').upper()}`"
        else:
            name = ", ".join(f"`{each}`" for each in [*parameter.opts, *parameter.secondary_opts])
        default = parameter.default
        if callable(default) or default is None or default is False or default == () or default == []:
            shown = "required" if parameter.required else ""
        else:
            shown = f"`{getattr(default, 'value', default)}`"
        if "UNSET" in shown.upper():
            shown = "required" if parameter.required else ""
        yield name, shown, getattr(parameter, "help", None) or ""


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_paragraph(event: type[BaseModel]) -> str:
    return inspect.cleandoc(event.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _paragraphs(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n"))


def main() -> int:
    """Write the pages; with `--check`, return 1 if one of them is not current."""
    stale = [path for path, text in documents().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is not current: run python docs/generate.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in documents().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
