"""The published contract: current, consistent in itself, and as strict as the models."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from typer.testing import CliRunner

from protocols import asyncapi
from protocols.encoding import EventError, decode, encode
from protocols.events import ImageIndexed, ImageNew, RerankRequest, RerankResponse
from protocols.examples import examples
from strategies import events

DEPLOY = Path(__file__).parents[2] / "deploy"
MODELS = [ImageNew, ImageIndexed, RerankRequest, RerankResponse]
VALIDATORS = {model: Draft202012Validator(asyncapi.schema_of(model)) for model in MODELS}

HAND_WRITTEN = [
    (
        RerankRequest,
        """{"schema_version": 1, "request_id": "r-1", "query": {"text": "a dog runs on a beach"}, "top_n": 10,
        "deadline": "2026-11-23T12:00:00.250Z",
        "candidates": [{"image_id": "img-7", "score": 0.31}, {"image_id": "img-2", "score": 0.29}]}""",
    ),
    (
        RerankResponse,
        """{"schema_version": 1, "request_id": "r-1", "status": "ok", "model": "9f2c", "engine": "77ab", "missing": [],
        "timings_ms": {"queue": 1.2, "fetch": 0.8, "score": 3.1},
        "results": [{"index": 1, "id": "img-2", "relevance_score": 0.93, "logit": 2.6},
        {"index": 0, "id": "img-7", "relevance_score": 0.08, "logit": -2.4}]}""",
    ),
    (ImageNew, '{"schema_version": 1, "image_id": "img-7", "uri": "https://images.example/7.jpg"}'),
]


def test_the_files_under_deploy_are_current():
    result = CliRunner().invoke(asyncapi.app, ["--check"])

    assert result.exit_code == 0, result.output


def test_a_stale_or_absent_file_fails_the_check_and_is_written_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(asyncapi, "_DEPLOY", tmp_path)

    assert CliRunner().invoke(asyncapi.app, ["--check"]).exit_code == 1
    assert not list(tmp_path.iterdir())
    assert CliRunner().invoke(asyncapi.app).exit_code == 0
    assert CliRunner().invoke(asyncapi.app, ["--check"]).exit_code == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_schema_is_valid_json_schema(model):
    Draft202012Validator.check_schema(asyncapi.schema_of(model))


@pytest.mark.parametrize("model", MODELS)
def test_every_example_fits_schema_and_model(model):
    for example in examples()[model].values():
        VALIDATORS[model].validate(json.loads(encode(example)))
        assert decode(model, encode(example)) == example


@pytest.mark.parametrize(("model", "text"), HAND_WRITTEN)
def test_an_event_written_by_hand_fits_schema_and_model(model, text):
    VALIDATORS[model].validate(json.loads(text))
    assert encode(decode(model, text.encode()))


@given(event=events)
def test_what_a_model_writes_fits_its_schema(event):
    VALIDATORS[type(event)].validate(json.loads(encode(event)))


_CHANGES = [
    {"request_id": ""},
    {"request_id": "a\tb"},
    {"query": {}},
    {"query": {"text": None}},
    {"query": {"text": "a", "image_id": "b"}},
    {"query": {"image_id": "b"}},
    {"candidates": [{"text": "a"}]},
    {"candidates": [{"image_id": "a", "text": "b"}]},
    {"candidates": [{"image_id": None}]},
    {"candidates": [{"image_id": "a", "score": "high"}]},
    {"candidates": None},
    {"deadline": 1},
    {"priority": 10},
    {"priority": "1"},
    {"top_n": 0},
    {"top_n": 1.5},
    {"reply_topic": "a b"},
    {"schema_version": 2},
    {"candidates": []},
    {"candidates": [{"image_id": "a", "text": None, "color": 1}]},
    {"deadline": None, "top_n": None, "unknown": {}},
]


@given(changes=st.lists(st.sampled_from(_CHANGES), max_size=3))
def test_schema_and_model_agree_about_a_request(changes):
    fields = json.loads(HAND_WRITTEN[0][1])
    for change in changes:
        fields |= change

    def accepts(check, *arguments):
        try:
            check(*arguments)
        except (EventError, ValidationError):
            return False
        return True

    in_schema = accepts(VALIDATORS[RerankRequest].validate, fields)
    assert in_schema == accepts(decode, RerankRequest, json.dumps(fields).encode())


def _references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)


def test_every_reference_of_the_document_leads_somewhere():
    document = yaml.safe_load((DEPLOY / "asyncapi.yaml").read_text(encoding="utf-8"))

    references = set(_references(document))
    assert len(references) > 10
    for reference in references:
        path, _, pointer = reference.partition("#")
        node = json.loads((DEPLOY / path).read_text(encoding="utf-8")) if path else document
        for part in filter(None, pointer.split("/")):
            node = node[part]
        assert node


def test_every_header_of_a_dead_letter_is_documented():
    source = Path(asyncapi.__file__).with_name("dead_letters.py").read_text(encoding="utf-8")
    documented = asyncapi.document()["components"]["messages"]["DeadLetter"]["headers"]["properties"]

    assert set(documented) == set(re.findall(r'_HEADER = "([a-z-]+)"', source))
