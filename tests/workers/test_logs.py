"""Log lines for people and for machines, and the secrets that they never show."""

import io
import json
import logging
import sys
import threading
import warnings

import pytest
import structlog

from workers.errors import Transient
from workers.logs import set_up_logs


@pytest.fixture(autouse=True)
def logging_as_before():
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook)
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def lines():
    """Set up JSON lines and return what was logged since."""
    out = io.StringIO()
    set_up_logs(log_format="json", level="info", secrets=["hush-hush", "pw"], out=out)
    return lambda: [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_its_ids(lines):
    structlog.get_logger("workers.test").warning("request refused", request_id="r-1", trace_id="0af", num_pairs=3)

    (line,) = lines()

    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "request refused",
        "level": "warning",
        "logger": "workers.test",
        "request_id": "r-1",
        "trace_id": "0af",
        "num_pairs": 3,
    }


def test_what_is_below_the_level_is_not_written(lines):
    structlog.get_logger("workers.test").debug("detail")

    assert lines() == []


def test_a_library_logs_through_the_same_channel_from_a_higher_level_on(lines):
    logging.getLogger("kafka.client").info("connected to %s", "a")
    logging.getLogger("redis.pool").warning("lost %s", "redis://u:secret@h")
    logging.getLogger("somebody.else").info("hello %d", 3, extra={"place": "x"})

    assert [(line["logger"], line["event"]) for line in lines()] == [
        ("redis.pool", "lost redis://u:***@h"),
        ("somebody.else", "hello 3"),
    ]
    assert lines()[1]["place"] == "x"


def test_an_error_is_one_field(lines):
    try:
        raise Transient("the store is away")
    except Transient:
        structlog.get_logger("workers.test").exception("gave up", request_id="r-1")

    (line,) = lines()

    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("Transient: the store is away")
    assert line["request_id"] == "r-1"


def test_no_secret_is_written_wherever_it_turns_up(lines):
    log = structlog.get_logger("workers.test")
    log.info("hush-hush", url="redis://worker:other@host/0", headers={"x": ["hush-hush"]}, raw=b"hush-hush", pwd="pw")
    try:
        raise ValueError("login with hush-hush failed")
    except ValueError:
        log.exception("failed")

    assert "hush" not in str(lines())
    assert "other" not in str(lines())
    assert lines()[0]["pwd"] == "pw"  # too short to be masked inside ordinary words


def test_what_json_cannot_hold_is_written_as_text(lines):
    structlog.get_logger("workers.test").info("odd", value=object, items={1}, text="ä", number=float("nan"))

    (line,) = lines()

    assert (line["value"], line["items"], line["text"], line["number"]) == ("<class 'object'>", [1], "ä", "nan")


def test_an_uncaught_error_of_a_thread_is_logged(lines):
    def fails() -> None:
        raise RuntimeError("broken")

    thread = threading.Thread(target=fails, name="stage")
    thread.start()
    thread.join()

    (line,) = lines()

    assert (line["event"], line["level"], line["thread"]) == ("a thread ends by an error", "critical", "stage")
    assert "RuntimeError: broken" in line["exception"]


def test_an_uncaught_error_of_the_process_is_logged(lines):
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())

    assert lines()[0]["event"] == "the process ends by an error"


def test_a_warning_is_a_line(lines):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old habit", UserWarning, stacklevel=1)
        logging.captureWarnings(False)

    assert "old habit" in lines()[0]["event"]


def test_lines_for_people_hold_the_same_words():
    out = io.StringIO()
    set_up_logs(log_format="console", level="info", out=out)

    structlog.get_logger("workers.test").info("image stored", image_id="img-1")

    assert "image stored" in out.getvalue()
    assert "image_id=img-1" in out.getvalue()
    assert "\x1b" not in out.getvalue()
