"""The output of `python -m workers.publish`: results on standard output, remarks on standard error.

Most functions return whether everything succeeded. Ids and texts are untrusted and printed as plain text, never as
markup.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocols.dead_letters import DeadLetter
from protocols.encoding import encode
from protocols.events import RerankRequest
from workers.client import Reply
from workers.ports import Record
from workers.publish.backfill import Balance
from workers.publish.image_files import Refused, printable
from workers.publish.image_upload import Upload
from workers.publish.replay import Replay

#: Most names in one remark; further names are counted.
MAX_NAMED = 5
#: Characters of a dead letter's value in a line.
MAX_VALUE_CHARS = 160

remarks = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def print_upload(
    done: Upload, refused: Sequence[Refused], *, wait: bool, patience_s: float, removal: bool = False
) -> bool:
    """Print how many images or removals were published and, after waiting, their outcomes."""
    sentence = f"{done.published} published"
    if wait and removal:
        sentence += f", {done.removed} removed"
    elif wait:
        sentence += f", {done.indexed} indexed ({done.already_stored} of them were stored already)"
        if done.models:
            sentence += f", under model {', '.join(sorted(map(printable, done.models)))}"
    remarks.print(sentence)
    for code, number in sorted(done.dead.items()):
        remarks.print(f"{number} dead letters, {code}: {printable(done.causes[code])}")
    problems = [f"{printable(file.path)}: {file.reason}" for file in refused]
    problems += [f"{printable(image_id)}: {reason}" for image_id, reason in done.too_large]
    if problems:
        remarks.print(f"{len(problems)} not published: {_some(problems)}")
    if done.unanswered:
        names = _some([printable(name) for name in sorted(done.unanswered)])
        remarks.print(
            f"{len(done.unanswered)} images have no outcome, and none arrived for {patience_s:g} s: {names}; "
            "is the ingest worker running and ready, with this topic prefix? It retries unreachable images for minutes."
        )
    return not (done.dead or problems or done.unanswered)


def print_balance(balance: Balance, state: Path) -> bool:
    """Print the counts of a backfill; returns True if every row is in the store."""
    published = f"{balance.published} published"
    if balance.retried.total():
        published += f" and {balance.retried.total()} again"
    remarks.print(
        f"{balance.rows} rows = {published} + {balance.stored} stored before + {balance.duplicates} duplicates + "
        f"{balance.bad} without an image"
    )
    num_dead = balance.dead.total()
    remarks.print(
        f"{balance.published} published = {balance.indexed} indexed + {num_dead} dead + {balance.removed} removed + "
        f"{balance.too_large} too large"
    )
    for code, number in sorted(balance.dead.items()):
        if number:
            remarks.print(f"{number} dead letters, {code}")
    for reason in balance.bad_rows:
        remarks.print(printable(reason))
    if num_dead:
        remarks.print(f"to retry the dead letters, repeat the command with --retry-failed --state {state}")
    return not (num_dead or balance.bad or balance.too_large)


def print_letter(record: Record, letter: DeadLetter, *, as_json: bool) -> None:
    """Print one dead letter: a line of text, or a JSON object with the whole value."""
    at = datetime.fromtimestamp(record.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    value = letter.value
    if as_json:
        text = None if value is None else value.decode("utf-8", "surrogateescape")
        is_text = text is not None and text.isprintable()
        fields = {
            "at": at,
            "topic": letter.topic,
            "partition": letter.partition,
            "offset": letter.offset,
            "key": None if letter.key is None else letter.key.decode("utf-8", "replace"),
            "error_code": letter.error_code,
            "error_class": letter.error_class,
            "message": letter.message,
            "attempts": letter.attempts,
            "truncated": letter.truncated,
            "value": text if is_text else None,
            "value_base64": None if value is None or is_text else base64.b64encode(value).decode(),
        }
        print(json.dumps(fields, ensure_ascii=False))
        return
    key = "no key" if letter.key is None else printable(letter.key.decode("utf-8", "replace"))
    shown = "null" if value is None else printable(value[:MAX_VALUE_CHARS].decode("utf-8", "replace"))
    cut = "…" if value is not None and len(value) > MAX_VALUE_CHARS else ""
    origin = f"{letter.topic}-{letter.partition} offset {letter.offset}"
    Console(highlight=False, markup=False, soft_wrap=True).print(
        f"{at}  {letter.error_code}  {key}  ({origin}, {letter.attempts} attempts)\n"
        f"    {printable(letter.message)}\n    {shown}{cut}"
    )


def print_reply(reply: Reply, request: RerankRequest, *, as_json: bool) -> bool:
    """Print the ranking; returns False for a request without a ranking."""
    response = reply.response
    if as_json:
        print(encode(response).decode())
        return response.status in ("ok", "partial")
    if response.error is not None:
        remarks.print(f"{response.status}: {response.error.code}: {printable(response.error.message)}")
        return False
    if response.status == "expired":
        remarks.print("expired: the deadline passed before the request was scored")
        return False
    table = Table("rank", "id" if request.query.text is not None else "text", "score", "logit", "before")
    for column in (0, 2, 3, 4):
        table.columns[column].justify = "right"
    names = request.names() if request.query.text is not None else request.texts()
    before = first_stage_ranks(request)
    for rank, result in enumerate(response.results, start=1):
        name = Text(printable(names[result.index]))
        score, logit = f"{result.relevance_score:.4f}", f"{result.logit:+.3f}"
        table.add_row(str(rank), name, score, logit, str(before[result.index]))
    Console(highlight=False).print(table)
    timings = ", ".join(f"{stage} {took:.1f}" for stage, took in response.timings_ms.items())
    remarks.print(f"model {response.model}, engine {response.engine}, trace {reply.trace_id or 'none'}; ms: {timings}")
    if response.missing:
        missing = _some([printable(name) for name in response.missing])
        remarks.print(f"{len(response.missing)} candidates have no usable tokens under this model: {missing}")
    return True


def print_search(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the images of a search, best first; warnings go to standard error."""
    if as_json:
        print(json.dumps(answer, ensure_ascii=False))
        return
    if answer.get("degraded"):
        remarks.print(f"not reranked: {answer.get('degraded_message') or answer['degraded']}")
    for warning in answer.get("warnings", ()):
        remarks.print(warning["message"])
    table = Table("rank", "before", "score", "image", box=None, pad_edge=False)
    for result in answer["results"]:
        score = result.get("relevance_score")
        shown = "" if score is None else "no tokens" if result.get("is_missing") else f"{score:.4f}"
        table.add_row(str(result["rank"]), str(result["rank_before"]), shown, Text(result["image_id"]))
    Console(highlight=False, markup=False).print(table)
    if not answer["results"]:
        remarks.print("no image found: the index is empty, or no image has this metadata")


def first_stage_ranks(request: RerankRequest) -> list[int]:
    """Return each candidate's first-stage rank: by score if all have one, else by position in the request."""
    scores = [candidate.get("score") for candidate in request.candidates]
    order = sorted(range(len(scores)), key=lambda index: -(scores[index] or 0.0)) if None not in scores else None
    ranks = [0] * len(scores)
    for rank, index in enumerate(order or range(len(scores)), start=1):
        ranks[index] = rank
    return ranks


def print_replay(done: Replay, *, dry_run: bool) -> bool:
    """Print the counts of a replay by error code, and the `--since` of the next replay."""
    columns = {
        "would be replayed" if dry_run else "replayed": done.replayed,
        "truncated": done.truncated,
        "other code": done.passed_over,
        "beyond the limit": done.beyond_limit,
    }
    codes = sorted(set().union(*columns.values()))
    if codes:
        table = Table("error code", *columns)
        for code in codes:
            table.add_row(Text(printable(code)), *(str(counts[code] or "") for counts in columns.values()))
        Console(highlight=False).print(table)
    else:
        remarks.print("no dead letters")
    if done.foreign:
        remarks.print(f"{done.foreign} messages are not dead letters of this topic and were ignored")
    if done.next_since is not None and not dry_run:
        remarks.print(f"to continue from here: --since {done.next_since.isoformat(timespec='milliseconds')}")
    return True


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
