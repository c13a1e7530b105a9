"""The field types of events and their bounds.

The bounds limit the memory that a hostile message can take; services set tighter ones.
"""

from __future__ import annotations

import base64
import contextlib
import re
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    PlainSerializer,
    Strict,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)

MAX_ID_CHARS = 256
MAX_DIGEST_CHARS = 128
MAX_URI_CHARS = 8_192  # signed object-store addresses run to about 2,000
MAX_INLINE_BYTES = 48 * 2**20  # of image data inside an event; its base64 form is 64 MiB
MAX_QUERY_CHARS = 10_000
MAX_CANDIDATES = 100_000
MAX_PRIORITY = 9
MAX_METADATA_ENTRIES = 64
MAX_METADATA_KEY_CHARS = 128
MAX_METADATA_VALUE_CHARS = 2_048
MAX_STAGES = 64
MAX_EMBEDDING_DIM = 8_192
MAX_TOKENS = 65_536
MAX_ERROR_CODE_CHARS = 64
MAX_ERROR_MESSAGE_CHARS = 2_000
MAX_TOPIC_CHARS = 249  # Kafka's own limit
MAX_PARTITION = 2**31 - 1  # Kafka numbers partitions with a signed 32-bit integer
MAX_WARNINGS = 16
MAX_EXPLAINED_WORDS = 64
MAX_EXPLAINED_WORD_CHARS = 256
MAX_EXPLAINED_TOKENS = 1_024

#: Without the C0 and C1 control characters: ids are printed in logs, keys and tables.
NO_CONTROL_CHARACTERS = r"^[^\x00-\x1f\x7f-\x9f]+$"
TOPIC_NAME = r"^[a-zA-Z0-9._-]+$"

#: Maps the URL alphabet to the standard alphabet and removes white space.
_BASE64_SPELLINGS = str.maketrans("-_", "+/", " \t\r\n\f\v")

_DATE_FIRST = re.compile(r"\d{4}-\d\d-\d\d[Tt ]")


def _refuse_numeric_timestamp(value: Any) -> Any:
    # Pydantic reads a number as seconds or as milliseconds, depending on its size.
    if isinstance(value, datetime) or (isinstance(value, str) and _DATE_FIRST.match(value)):
        return value
    raise ValueError("a timestamp is RFC 3339 text with an offset, such as 2026-11-23T12:00:00.250Z")


def _from_base64(value: Any, info: ValidationInfo) -> Any:
    """Decode base64 text in the usual forms: either alphabet, with line breaks, without padding, as a data: address."""
    if info.mode != "json":
        return value  # bytes in msgpack
    if not isinstance(value, str):
        raise ValueError("must be base64 text")
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("a data: address must hold base64: data:image/jpeg;base64,...")
    with contextlib.suppress(ValueError):
        return base64.b64decode(value, validate=True)
    text = value.translate(_BASE64_SPELLINGS).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise ValueError("is not base64: letters, digits, + and / (or - and _), and = at the end") from None


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS, pattern=NO_CONTROL_CHARACTERS)]
Digest = Annotated[str, StringConstraints(min_length=1, max_length=MAX_DIGEST_CHARS, pattern=r"^[!-~]+$")]
Sha256Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Uri = Annotated[str, StringConstraints(min_length=1, max_length=MAX_URI_CHARS, pattern=NO_CONTROL_CHARACTERS)]
TopicName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TOPIC_CHARS, pattern=TOPIC_NAME)]
QueryText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY_CHARS)]
CandidateText = Annotated[str, StringConstraints(max_length=MAX_QUERY_CHARS)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Deadline = Annotated[AwareDatetime, Strict(False), BeforeValidator(_refuse_numeric_timestamp)]
Timings = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1, max_length=64)], Finite], Field(max_length=MAX_STAGES)
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=MAX_METADATA_KEY_CHARS)],
        Annotated[str, StringConstraints(max_length=MAX_METADATA_VALUE_CHARS)],
    ],
    Field(max_length=MAX_METADATA_ENTRIES),
]
#: Bytes in msgpack; in JSON base64, written in the standard alphabet and read in both.
InlineData = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    Field(min_length=1, max_length=MAX_INLINE_BYTES),
    PlainSerializer(_to_base64, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 4}),
]
