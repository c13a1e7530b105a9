"""Writes the contract as AsyncAPI 3 and JSON Schema, generated from the models.

python -m protocols.asyncapi            writes deploy/asyncapi.yaml and deploy/schemas/
python -m protocols.asyncapi --check    writes nothing, and exits 1 if a file is not current
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from protocols import dead_letters
from protocols.encoding import CONTENT_TYPE_HEADER, JSON, MSGPACK
from protocols.events import Event, ImageIndexed, ImageNew, RerankRequest, RerankResponse
from protocols.examples import examples
from protocols.topics import Topics

_DEPLOY = Path(__file__).parents[1] / "deploy"
_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_KAFKA_BINDING = "0.5.0"

#: The channel, topic and key of each event.
_EVENTS: dict[type[Event], tuple[str, str, str]] = {
    ImageNew: ("imagesNew", Topics().images_new, "image_id"),
    ImageIndexed: ("imagesIndexed", Topics().images_indexed, "image_id"),
    RerankRequest: ("rerankRequests", Topics().rerank_requests, "request_id"),
    RerankResponse: ("rerankResponses", Topics().rerank_responses, "request_id"),
}
#: Events of these channels can be followed by a tombstone: a message with the image's key and a null value.
_WITH_TOMBSTONES = {ImageNew, ImageIndexed}
_DEAD_LETTERS = {"imagesNewDeadLetters": Topics().images_new, "rerankRequestsDeadLetters": Topics().rerank_requests}

_DEAD_LETTER_HEADERS = {
    dead_letters.TOPIC_HEADER: "topic of the original message",
    dead_letters.PARTITION_HEADER: "partition of the original message, in decimal",
    dead_letters.OFFSET_HEADER: "offset of the original message, in decimal",
    dead_letters.ERROR_CLASS_HEADER: "class of the error",
    dead_letters.ERROR_CODE_HEADER: "stable word for the cause, as in an error reply",
    dead_letters.MESSAGE_HEADER: "the cause in a sentence",
    dead_letters.ATTEMPTS_HEADER: "number of attempts, in decimal",
    dead_letters.TRUNCATED_HEADER: "'true' where the original did not fit the broker's limit and was cut",
}


def schema_of(event: type[Event]) -> dict[str, Any]:
    """Return the JSON Schema of one event."""
    return {"$schema": _SCHEMA_DIALECT, **event.model_json_schema()}


def document() -> dict[str, Any]:
    """Return the AsyncAPI document."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "EDJE reranking",
            "version": "1.0.0",
            "description": "Indexes images and ranks candidates. All topic names may have the same prefix.\n"
            f"An event is JSON unless its {CONTENT_TYPE_HEADER} header is {MSGPACK}; of a header that comes twice the "
            "last one counts. A reply has the encoding of its request.\n"
            "Unknown fields are ignored, and null means the same as absent.\n"
            "Every request whose id can be read gets one reply; a request that cannot be processed also goes to the "
            "dead-letter topic. The id of a broken request is read from its request_id field, or from its key.",
        },
        "defaultContentType": JSON,
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": {event.__name__: _message(event) for event in _EVENTS}
            | {"ImageRemoved": _image_removed(), "DeadLetter": _dead_letter()},
            "messageTraits": {"eventHeaders": {"headers": _event_headers()}},
        },
    }


def _channels() -> dict[str, Any]:
    channels: dict[str, Any] = {}
    for event, (channel, topic, _) in _EVENTS.items():
        names = (event.__name__, "ImageRemoved") if event in _WITH_TOMBSTONES else (event.__name__,)
        channels[channel] = {"address": topic, "messages": {name: _message_ref(name) for name in names}}
    for channel, topic in _DEAD_LETTERS.items():
        address = Topics().dead_letter(topic)
        channels[channel] = {"address": address, "messages": {"DeadLetter": _message_ref("DeadLetter")}}
    return channels


def _operations() -> dict[str, Any]:
    return {
        "receiveImages": {
            "action": "receive",
            "channel": _channel_ref("imagesNew"),
            "summary": "Encode an image and store its tokens, or remove them where the value is null.",
        },
        "announceIndexedImages": {
            "action": "send",
            "channel": _channel_ref("imagesIndexed"),
            "summary": "Sent after the tokens are in the store, or after they are removed (null value).",
        },
        "receiveRequests": {
            "action": "receive",
            "channel": _channel_ref("rerankRequests"),
            "summary": "Rank candidates for a query.",
            "description": "The reply goes to the request's reply_topic where it names one that is allowed.",
            "reply": {"channel": _channel_ref("rerankResponses")},
        },
        "sendDeadImages": {"action": "send", "channel": _channel_ref("imagesNewDeadLetters")},
        "sendDeadRequests": {"action": "send", "channel": _channel_ref("rerankRequestsDeadLetters")},
    }


def _message(event: type[Event]) -> dict[str, Any]:
    _, _, key = _EVENTS[event]
    return {
        "name": event.__name__,
        "summary": event.__doc__,
        "contentType": JSON,
        "traits": [{"$ref": "#/components/messageTraits/eventHeaders"}],
        "payload": {
            "schemaFormat": "application/schema+json;version=draft-2020-12",
            "schema": {"$ref": f"./schemas/{_file_name(event)}"},
        },
        "bindings": _key_binding(key),
        "examples": [
            {"name": name, "payload": json.loads(example.model_dump_json(exclude_none=True))}
            for name, example in examples()[event].items()
        ],
    }


def _image_removed() -> dict[str, Any]:
    return {
        "name": "ImageRemoved",
        "summary": "A tombstone: the image's key and a null value. On images.new it removes the image from the "
        "store and every index; on images.indexed it reports that the image is removed.",
        "payload": {"type": "null"},
        "bindings": _key_binding("image_id"),
    }


def _dead_letter() -> dict[str, Any]:
    return {
        "name": "DeadLetter",
        "summary": "A message that can never succeed: its original key, value (null stays null) and headers, and the "
        "cause in the headers below. To replay the message, publish it without these headers.",
        "contentType": "application/octet-stream",
        "headers": {
            "type": "object",
            "required": [name for name in _DEAD_LETTER_HEADERS if name != dead_letters.TRUNCATED_HEADER],
            "properties": {
                name: {"type": "string", "description": meaning} for name, meaning in _DEAD_LETTER_HEADERS.items()
            },
        },
        "bindings": _key_binding("the key of the original"),
    }


def _event_headers() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            CONTENT_TYPE_HEADER: {"type": "string", "enum": [JSON, MSGPACK], "default": JSON},
            "traceparent": {"type": "string", "description": "W3C trace context; replies continue the trace"},
            "tracestate": {"type": "string", "description": "W3C trace context"},
        },
    }


def _key_binding(meaning: str) -> dict[str, Any]:
    return {"kafka": {"key": {"type": "string", "description": meaning}, "bindingVersion": _KAFKA_BINDING}}


def _channel_ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/channels/{name}"}


def _message_ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/messages/{name}"}


def _file_name(event: type[Event]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", event.__name__).lower() + ".json"


def render() -> dict[str, str]:
    """Return the text of every file by its path below deploy/."""
    files = {
        f"schemas/{_file_name(event)}": json.dumps(schema_of(event), indent=2, ensure_ascii=False) + "\n"
        for event in _EVENTS
    }
    files["asyncapi.yaml"] = (
        "# Generated from protocols/ by `python -m protocols.asyncapi`; do not edit.\n"
        + yaml.safe_dump(document(), sort_keys=False, allow_unicode=True, width=120)
    )
    return files


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if a file is not current.")] = False,
) -> None:
    """Write the contract: AsyncAPI 3 and JSON Schema."""
    stale = []
    for name, text in render().items():
        path = _DEPLOY / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for name in stale:
        typer.echo(f"deploy/{name} {'is not current: run python -m protocols.asyncapi' if check else 'written'}")
    if check and stale:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
