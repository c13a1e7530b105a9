"""The reference of recipe fields: complete, and generated from the fields themselves."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from edje import recipe_reference
from edje.recipe_reference import markdown, tables

RECIPES = Path(__file__).parents[2] / "edje" / "recipes"


def names_of(heading):
    return {field.name for table in tables() if table.heading.startswith(heading) for field in table.fields}


def test_every_field_has_a_meaning_a_type_and_a_default():
    for table in tables():
        assert table.summary, table.heading
        for field in table.fields:
            assert field.meaning.endswith((".", ")")), f"{table.heading}: {field.name}"
            assert field.type_name, f"{table.heading}: {field.name}"


def test_a_field_without_a_meaning_is_an_error(monkeypatch):
    class Incomplete(BaseModel):
        size: int

    monkeypatch.setattr(recipe_reference, "Recipe", Incomplete)

    with pytest.raises(ValueError, match=r"Incomplete\.size has no description"):
        tables()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_field_of_the_recipes_of_the_package_is_documented(path):
    recipe = tomllib.loads(path.read_text())

    assert set(recipe) <= names_of("Top level")
    for name, heading in [("joint", "`[joint]"), ("adapter", "`[adapter]"), ("first_stage", "`[first_stage]")]:
        assert set(recipe[name]) <= names_of(heading)
    for phase in recipe["phase"]:
        assert set(phase) <= names_of("`[[phase]]")
    for data in recipe["data"].get("parts", {"only": recipe["data"]}).values():
        assert set(data) <= names_of("`[data")


def test_every_kind_of_data_has_a_table():
    headings = [table.heading for table in tables()]

    for kind in ("karpathy", "table", "flickr8k", "scenes", "several"):
        assert any(f'kind = "{kind}"' in heading for heading in headings)
    assert len(set(headings)) == len(headings)


def test_rows_show_types_and_defaults_as_in_toml():
    text = markdown()

    assert "| `name` | text | required | Name of the model. |" in text
    assert "| `keeps_patches` | true or false | true |" in text
    assert '| `kind` | `"full"` or `"late"` or `"minimal"` or `"maxsim"` | `"full"` |' in text
    assert "| `csv_path` | path | required |" in text
    assert "| `skip` | list of text | `[]` |" in text


def test_the_command_prints_the_reference():
    done = subprocess.run([sys.executable, "-m", "edje.recipe_reference"], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == markdown().strip()
    assert all(line.count(" | ") == 3 for line in done.stdout.splitlines() if line.startswith("| `"))
