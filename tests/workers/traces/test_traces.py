"""The waterfall of one request from a file of spans, which may hold anything else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from opentelemetry.sdk.resources import Resource
from rich.console import Console
from typer.testing import CliRunner

from rerank_harness import Rig, request
from tracing_harness import Recorded
from workers.telemetry.otlp_json import span_line
from workers.telemetry.span_file import predecessor_of
from workers.traces.__main__ import app
from workers.traces.reading import MAX_LINE_BYTES, read_spans
from workers.traces.showing import terminal_table, write_page
from workers.traces.waterfall import waterfall_of

NOBODY = Resource.get_empty()
SAMPLED = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01".encode()),)
OTHER = (("traceparent", f"00-{'c' * 32}-{'d' * 16}-01".encode()),)


def lines_of_two_requests() -> list[bytes]:
    """Two requests that share a micro-batch."""
    recorded = Recorded()
    rig = Rig(make_tracer=lambda rig: recorded.tracer(lambda: rig.now))
    rig.put({"i1": 1, "i2": 2})
    rig.send(request(["i1"], request_id="one"), SAMPLED)
    rig.send(request(["i2"], request_id="two"), OTHER)
    rig.turn()
    rig.now += 0.01
    rig.run()
    return [span_line(NOBODY, span) for span in recorded.finished]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "spans.jsonl"
    path.write_bytes(b"".join(lines_of_two_requests()))
    return path


def test_a_request_is_shown_with_its_stages_and_the_batch_it_shared(file):
    waterfall = waterfall_of(read_spans([file]).spans, "one")

    rows = {row.span.name: row for row in waterfall.rows}
    assert {"process rerank.requests", "fetch", "MGET", "micro-batch", "score pairs"} <= rows.keys()
    assert waterfall.shared_with == ["two"]
    assert (rows["micro-batch"].is_shared, rows["fetch"].is_shared) == (True, False)
    assert rows["score pairs"].depth == rows["micro-batch"].depth + 1 == 2
    assert rows["fetch"].duration_ms == pytest.approx(10)
    assert len([row for row in waterfall.rows if row.span.name.startswith("process")]) == 1


def test_a_read_of_blobs_that_two_requests_wait_for_brings_nothing_else_of_the_other(tmp_path):
    recorded = Recorded()
    rig = Rig(make_tracer=lambda rig: recorded.tracer(lambda: rig.now))
    rig.put({"i1": 1})
    rig.send(request(["i1"], request_id="one"), SAMPLED)
    rig.turn()
    rig.send(request(["i1"], request_id="two"), OTHER)
    rig.turn()
    rig.now += 0.01
    rig.run()
    path = tmp_path / "spans.jsonl"
    path.write_bytes(b"".join(span_line(NOBODY, span) for span in recorded.finished))

    waterfalls = [waterfall_of(read_spans([path]).spans, name) for name in ("one", "two")]

    for waterfall in waterfalls:
        shown = [row.span.name for row in waterfall.rows]
        assert shown.count("MGET") == shown.count("fetch") == shown.count("process rerank.requests") == 1
    one, two = ([row.is_shared for row in each.rows if row.span.name == "MGET"] for each in waterfalls)
    assert (one, two) == ([False], [True])


def test_a_request_without_spans_is_not_found(file):
    assert waterfall_of(read_spans([file]).spans, "three") is None


def test_of_a_request_that_came_twice_the_latest_is_shown(file):
    spans = read_spans([file]).spans
    line = json.loads(next(line for line in lines_of_two_requests() if b'"one"' in line and b"process" in line))
    again = line["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    again |= {"traceId": "e" * 32, "startTimeUnixNano": str(10**18), "endTimeUnixNano": str(10**18 + 1)}
    file.write_text(json.dumps(line))

    waterfall = waterfall_of([*spans, *read_spans([file]).spans], "one")

    assert (waterfall.trace_id, waterfall.num_traces) == ("e" * 32, 2)


def broken(**changes: object) -> bytes:
    line = json.loads(lines_of_two_requests()[0])
    line["resourceSpans"][0]["scopeSpans"][0]["spans"][0] |= changes
    return json.dumps(line).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\n",
        b"{}\n",
        b"[]\n",
        b"7\n",
        b'{"resourceSpans": 7}\n',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [null]}]}]}\n',
        b"[" * 100_000 + b"\n",
        broken(traceId="a"),
        broken(traceId=7),
        broken(name=None),
        broken(startTimeUnixNano="soon"),
        broken(startTimeUnixNano="9" * 5000),
        broken(endTimeUnixNano="-1"),
        broken(endTimeUnixNano=str(1 << 70)),
        broken(links=[{}]),
        broken(attributes={"a": 1}),
        broken(attributes=[{"key": "a", "value": {"intValue": "x"}}]),
        broken(status=7),
    ],
    ids=range(18),
)
def test_a_line_that_is_no_span_is_counted_and_left_out(file, line):
    whole = file.read_bytes()
    file.write_bytes(line + whole + lines_of_two_requests()[0][:-40])  # and the last one is cut off

    found = read_spans([file])

    assert found.num_bad_lines == 2
    assert waterfall_of(found.spans, "one") is not None


def test_a_line_without_end_is_not_read_into_memory_as_a_whole(file):
    whole = file.read_bytes()
    file.write_bytes(b" " * (MAX_LINE_BYTES // 2) + b"x" * MAX_LINE_BYTES + b"\n" + whole)

    assert waterfall_of(read_spans([file]).spans, "one") is not None


def test_spans_that_are_each_others_parents_end(file):
    line = json.loads(next(line for line in lines_of_two_requests() if b'"one"' in line and b"process" in line))
    span = line["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span["parentSpanId"] = span["spanId"]
    file.write_text(json.dumps(line))

    waterfall_of(read_spans([file]).spans, "one")


def test_a_page_escapes_its_texts_and_a_terminal_gets_no_control_characters(file, tmp_path):
    name = "process <script>\x1b[2J"
    file.write_bytes(file.read_bytes().replace(b"process rerank.requests", json.dumps(name)[1:-1].encode()))
    waterfall = waterfall_of(read_spans([file]).spans, "one")

    write_page(waterfall, tmp_path / "trace.html")
    console = Console(record=True, file=io.StringIO(), width=200)
    console.print(terminal_table(waterfall))

    page = (tmp_path / "trace.html").read_text()
    assert "process &lt;script&gt;" in page
    assert "<script" not in page
    assert "://" not in page
    assert "\x1b[2J" not in console.export_text()


def test_the_command_reads_the_file_and_the_one_before_it_and_writes_a_page(file, tmp_path):
    lines = file.read_bytes().splitlines(keepends=True)
    predecessor_of(file).write_bytes(b"".join(lines[:3]))
    file.write_bytes(b"".join(lines[3:]) + b"broken")
    page = tmp_path / "pages" / "one.html"

    done = CliRunner().invoke(app, ["one", "--file", str(file), "--html", str(page)])

    assert done.exit_code == 0, done.output
    assert "micro-batch" in done.output
    assert "shared with two" in done.output
    assert "1 lines are not spans" in done.output
    assert "micro-batch" in page.read_text()


def test_the_command_names_what_is_missing(file, tmp_path):
    unknown = CliRunner().invoke(app, ["three", "--file", str(file)])
    no_file = CliRunner().invoke(app, ["one", "--file", str(tmp_path / "none.jsonl")])

    assert unknown.exit_code == 1
    assert "was it sampled" in unknown.output
    assert no_file.exit_code == 1
    assert "No such file" in no_file.output
