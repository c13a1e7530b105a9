"""The demo's parts that need no services: Procfile, first stage, pictures, report."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from demo_first_stage import WordOverlap
from demo_pictures import DETAILS, PHOTOGRAPHS, caption_of, pictures_in, shipped_pictures
from demo_report import Ranked, Ranking, write_report
from demo_workers import Worker, parse_procfile
from server_process import ServiceError

ROOT = Path(__file__).parent.parent
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>.png'


def test_procfile_is_read_as_names_and_words():
    assert parse_procfile("# both\ningest: python -m workers.ingest\n\nrerank:  sh -c 'a b'\n") == {
        "ingest": ["python", "-m", "workers.ingest"],
        "rerank": ["sh", "-c", "a b"],
    }


def test_our_procfile_names_the_two_workers():
    assert set(parse_procfile((ROOT / "Procfile").read_text())) == {"ingest", "rerank"}


def test_a_line_that_is_no_process_is_named():
    with pytest.raises(ServiceError, match="Procfile, line 2"):
        parse_procfile("a: b\njust words\n")


def test_a_worker_that_ends_at_once_is_told_with_the_end_of_its_log(tmp_path):
    worker = Worker(
        "ingest", ["sh", "-c", "echo $INGEST_CHECKPOINT is missing; exit 3"], tmp_path, {"INGEST_CHECKPOINT": "x"}
    )

    with pytest.raises(ServiceError, match=r"(?s)ingest ended with 3; the end of .*x is missing"):
        worker.start()


def test_the_caption_with_more_and_rarer_words_of_the_query_is_first():
    stage = WordOverlap({"a": "a red cup", "b": "a blue dog", "c": "a red dog"})

    assert [name for name, _ in stage.best("a DOG that is red", 3)] == ["c", "a", "b"]
    assert [name for name, _ in stage.best("a cup, or a dog", 3)] == ["a", "b", "c"]


def test_captions_that_share_nothing_stay_in_order():
    assert WordOverlap({"b": "cup", "a": "dog"}).best("nothing", 2) == [("a", 0.0), ("b", 0.0)]


def test_a_caption_is_the_words_of_a_file_name():
    assert caption_of("holiday/red-cup_of coffee.v2.jpg") == "holiday red cup of coffee v2"
    assert caption_of("....png") == "....png"


def test_the_shipped_pictures_are_real_files_and_enough(tmp_path):
    pictures = shipped_pictures(tmp_path / "pictures")

    assert len(pictures.files) == len(PHOTOGRAPHS) + len(DETAILS) >= 24
    assert pictures.image_query in pictures.captions()
    for file in pictures.files:
        with Image.open(file.path) as image:
            image.load()


def test_a_folder_of_ones_own_gives_captions_and_queries(tmp_path):
    for name in ("red-cup.jpg", "black cat.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    pictures = pictures_in(tmp_path)

    assert sorted(pictures.captions().values()) == ["black cat", "red cup"]
    assert sorted(pictures.queries) == ["black cat", "red cup"]


def test_a_folder_without_pictures_is_a_sentence(tmp_path):
    with pytest.raises(ServiceError, match="holds 0 image files; the demo needs at least 2"):
        pictures_in(tmp_path)


class Elements(HTMLParser):
    """The elements of a page, and the addresses they load from."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


@pytest.fixture
def hostile_report(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(picture)
    pictures = Ranking(
        HOSTILE, [Ranked(HOSTILE, HOSTILE, 1, 2, 0.9, picture), Ranked("b", "b", 2, 1, 0.1, picture)], {"score": 1.0}
    )
    texts = Ranking(HOSTILE, [Ranked(HOSTILE, HOSTILE, 1, 1, 0.5)], {"score": 1.0}, picture)

    def write(trained):
        report = tmp_path / "new" / "report.html"
        write_report(
            report, rankings=[pictures, texts], trained=trained, facts={"Pictures": HOSTILE}, credits=[HOSTILE]
        )
        return report.read_text()

    return write


def test_a_hostile_file_name_is_text_wherever_it_stands(hostile_report):
    page = Elements(hostile_report(trained=False))

    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_report_needs_nothing_but_itself(hostile_report):
    page = Elements(hostile_report(trained=False))

    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "link" not in page.tags


def test_untrained_weights_are_told_and_trained_ones_are_not(hostile_report):
    assert "The weights are untrained" in hostile_report(trained=False)
    assert "untrained" not in hostile_report(trained=True)
