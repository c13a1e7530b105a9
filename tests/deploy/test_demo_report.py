"""The demo's processes in Procfile, and its report."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from demo_rankings import Figures, Option, Question
from demo_report import Caveat, write_report
from demo_workers import Worker, parse_procfile, workers_of
from protocols.events import Result
from server_process import ServiceError

ROOT = Path(__file__).parents[2]
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>.png'


def test_procfile_is_read_as_names_and_words():
    assert parse_procfile("# both\ningest: python -m workers.ingest\n\nrerank:  sh -c 'a b'\n") == {
        "ingest": ["python", "-m", "workers.ingest"],
        "rerank": ["sh", "-c", "a b"],
    }


def test_our_procfile_names_every_process():
    assert set(parse_procfile((ROOT / "Procfile").read_text())) == {"ingest", "rerank", "index", "gateway"}


def test_an_invalid_line_of_procfile_is_reported_with_its_number():
    with pytest.raises(ServiceError, match="Procfile, line 2"):
        parse_procfile("a: b\njust words\n")


def test_a_worker_that_ends_at_once_is_reported_with_the_end_of_its_log(tmp_path):
    worker = Worker(
        "ingest", ["sh", "-c", "echo $INGEST_CHECKPOINT is missing; exit 3"], tmp_path, {"INGEST_CHECKPOINT": "x"}
    )

    with pytest.raises(ServiceError, match=r"(?s)ingest ended with 3; the end of .*x is missing"):
        worker.start()


def test_each_worker_has_its_own_settings_and_what_all_have(tmp_path):
    procfile = tmp_path / "Procfile"
    procfile.write_text("ingest: a\nrerank: b\nindex: c\ngateway: d\n")
    particular = {"gateway": {}, "rerank": {"SLAB_BYTES": "1"}, "ingest": {}}

    ingest, rerank, gateway = workers_of(procfile, {"REDIS_URL": "r"}, particular, "demo-1.", tmp_path)

    assert ingest.settings == {"REDIS_URL": "r", "INGEST_TOPIC_PREFIX": "demo-1.", "INGEST_GROUP_ID": "demo-1.ingest"}
    assert rerank.settings["RERANK_SLAB_BYTES"] == "1"
    assert gateway.settings == {"REDIS_URL": "r", "GATEWAY_TOPIC_PREFIX": "demo-1."}  # it has no group


class Elements(HTMLParser):
    """The elements of a page, their attributes, and end tags that match no open element."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.misplaced, self._open = [], [], [], []
        self.feed(page)
        self.misplaced += self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.misplaced.append(tag)


@pytest.fixture
def report(tmp_path):
    """Return a function that writes a report with hostile names and captions; the second candidate is right."""
    path = tmp_path / "picture.png"
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(path)
    results = [Result(index=index, relevance_score=0.5, logit=0.0) for index in (1, 0)]

    def write(*, figures=None, caveat=None, right="right"):
        images = [Option(HOSTILE, HOSTILE, 0.9, path), Option("right", HOSTILE, 0.1, path)]
        texts = [Option(HOSTILE, HOSTILE, 0.9), Option("right", HOSTILE, 0.1)]
        questions = [Question(HOSTILE, images, right), Question(HOSTILE, texts, right, HOSTILE, path)]
        report = tmp_path / "new" / "report.html"
        write_report(
            report,
            rankings=[question.ranking(results, {"score": 1.0}) for question in questions],
            found_by="counting",
            figures=figures,
            caveat=caveat,
            facts={"Pictures": HOSTILE},
        )
        return report.read_text()

    return write


def test_a_hostile_file_name_is_shown_as_text_everywhere(report):
    page = Elements(report(caveat=Caveat(HOSTILE, HOSTILE)))

    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_report_refers_to_no_other_file(report):
    page = Elements(report())

    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "link" not in page.tags


def test_every_element_is_closed_where_it_belongs(report):
    for page in (report(), report(figures=Figures(40, 0.5, 0.9, 16), caveat=Caveat("a", "b"), right=None)):
        assert Elements(page).misplaced == []


def test_every_picture_is_described_in_words(report):
    page = Elements(report())

    assert page.tags.count("img") == [name for name, _ in page.attributes].count("alt") == 5


def test_the_right_candidate_is_marked_in_words_before_and_after(report):
    page = report()

    assert page.count('class="badge">right<') == 4
    assert "The right picture: number 2 of 2 before, number 1 after." in page
    assert "The right text: number 2 of 2 before, number 1 after." in page
    assert 'badge"' not in report(right=None)


def test_the_figures_are_shown_at_the_top_if_there_are_any(report):
    page = report(figures=Figures(40, 0.525, 0.9, 16))

    assert "of 40 questions" in page
    assert "52.5 %" in page
    assert "90.0 %" in page
    assert "questions" not in report(figures=None)


def test_the_reason_for_a_meaningless_ranking_is_shown(report):
    assert "<strong>Untrained.</strong> Random numbers." in report(caveat=Caveat("Untrained", "Random numbers."))
    assert 'note"' not in report()
