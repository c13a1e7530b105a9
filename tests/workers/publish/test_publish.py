"""`python -m workers.publish` as a person runs it, against a real Kafka with a scripted worker behind it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from protocols.dead_letters import DeadLetter
from protocols.encoding import content_type_of, decode, encode
from protocols.events import ImageIndexed, ImageNew, RerankRequest, RerankResponse, Result
from protocols.topics import Topics
from services import create_topics
from workers.bus.memory import MemoryBroker, MemoryOutbox
from workers.bus.producer import KafkaOutbox
from workers.bus.reader import KafkaReader
from workers.ports import Outgoing, Partition, Record
from workers.publish.image_files import AmbiguousName, Refused, image_events, image_files, printable
from workers.publish.output import first_stage_ranks, print_letter
from workers.publish.query_input import candidates_of, image_ids_of, request_of
from workers.publish.replay import letters_in, replay

ROOT = Path(__file__).parents[3]
DIGESTS = {"model": "m-1", "engine": "e-1"}
TIMEOUT_S = 60


# What a person types, without a broker.


def test_ids_are_paths_below_the_folder_without_extension(tmp_path):
    (tmp_path / "dogs").mkdir()
    for name in ("b.JPG", "dogs/a.png", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()

    assert [file.image_id for file in image_files([tmp_path], id_prefix="x-")] == ["x-b", "x-dogs/a"]


def test_a_named_file_is_published_with_any_suffix(tmp_path):
    (tmp_path / "photo.raw").touch()

    assert [file.image_id for file in image_files([tmp_path / "photo.raw"])] == ["photo"]


def test_two_files_with_one_id_are_refused_unless_extensions_are_kept(tmp_path):
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()

    with pytest.raises(AmbiguousName, match=r"a\.(jpg|png) and .*a\.(jpg|png) would both be 'a'"):
        image_files([tmp_path])
    assert [file.image_id for file in image_files([tmp_path], keep_extension=True)] == ["a.jpg", "a.png"]


def test_a_file_too_large_for_a_message_is_refused_unread(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")

    (refused,) = image_events(image_files([tmp_path]), "data", max_data_bytes=4)

    assert isinstance(refused, Refused)
    assert refused.reason == "5 bytes; a message carries at most 4"


def test_a_name_that_can_be_no_id_is_refused_and_printed_without_its_control_characters(tmp_path):
    (tmp_path / "a\x1b[2J.png").write_bytes(b"1")

    (refused,) = image_events(image_files([tmp_path]), "uri", max_data_bytes=9)

    assert isinstance(refused, Refused)
    assert printable(refused.path).endswith("a\\x1b[2J.png")


def test_a_file_in_the_event_is_the_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")

    assert list(image_events(image_files([tmp_path]), "data", max_data_bytes=9)) == [
        ImageNew(image_id="a", data=b"12345")
    ]


def test_candidate_lines_may_carry_first_stage_scores():
    found = candidates_of(None, (), ["img-7\t0.5\n", "\n", "img-2\n"], for_image=False)

    assert found == [{"image_id": "img-7", "score": 0.5}, {"image_id": "img-2"}]


def test_a_text_with_commas_stays_one_candidate():
    assert candidates_of(None, (), ["a dog, a beach\n"], for_image=True) == [{"text": "a dog, a beach"}]


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="'high' after the tab is not a first-stage score"):
        candidates_of(None, (), ["img-7\thigh"], for_image=False)


def test_a_deadline_counts_from_now():
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    made = request_of("a dog", None, [], deadline_ms=250, now=now)

    assert made.deadline == datetime(2026, 11, 23, 12, 0, 0, 250_000, tzinfo=UTC)


def test_a_request_that_breaks_the_contract_is_one_sentence_without_the_input():
    with pytest.raises(ValueError, match="reply_topic: String should match pattern") as caught:
        request_of("a dog", None, [], reply_topic="no such topic!")
    assert "no such topic!" not in str(caught.value)


def test_the_rank_before_is_by_score_where_all_candidates_have_one():
    scored = request_of("q", None, [{"image_id": "a", "score": 0.1}, {"image_id": "b", "score": 0.9}])
    unscored = request_of("q", None, [{"image_id": "a"}, {"image_id": "b", "score": 0.9}])

    assert first_stage_ranks(scored) == [2, 1]
    assert first_stage_ranks(unscored) == [1, 2]


# Replaying, without a broker.


class Letters:
    """A dead-letter topic with these letters, a second apart."""

    def __init__(self, *letters):
        self.records = [
            Record(Partition("t.dlq", 0), offset, letter.key, letter.value, letter.to_headers(), 1000 * (offset + 1))
            for offset, letter in enumerate(letters)
        ]

    def poll(self, timeout_s):
        records, self.records = self.records, []
        return records

    def caught_up(self):
        return not self.records


def dead(code="broken", *, topic="t", truncated=False, value: bytes | None = b"v"):
    return DeadLetter(topic, 0, 7, value, b"k", (("h", b"1"),), "Poison", code, "why", truncated=truncated)


def test_a_replayed_tombstone_stays_a_null_value():
    broker = MemoryBroker()

    replay(Letters(dead(value=None), dead(value=b"")), MemoryOutbox(broker), "t.dlq", max_letters=9)

    assert [record.value for record in broker.log("t")] == [None, b""]


def test_letters_are_listed_with_their_records_and_by_code():
    letters = Letters(dead("a"), dead("b"), dead("a", topic="elsewhere"))

    found = list(letters_in(letters, "t.dlq", codes=["a"]))

    assert [(record.offset, letter.error_code) for record, letter in found] == [(0, "a")]


@pytest.mark.parametrize(
    ("value", "text", "as_base64"),
    [(None, None, None), (b"{}", "{}", None), (b"\xff\x00", None, "/wA="), (b"", "", None)],
)
def test_a_letter_as_json_holds_the_whole_value(capsys, value, text, as_base64):
    ((record, letter),) = letters_in(Letters(dead(value=value)), "t.dlq")

    print_letter(record, letter, as_json=True)

    shown = json.loads(capsys.readouterr().out)
    assert (shown["value"], shown["value_base64"]) == (text, as_base64)
    assert (shown["key"], shown["error_code"], shown["message"]) == ("k", "broken", "why")


def test_a_letter_as_text_shows_no_control_characters(capsys):
    ((record, letter),) = letters_in(Letters(dead(value=b"\x1b[2J" + b"x" * 500)), "t.dlq")

    print_letter(record, letter, as_json=False)

    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[2Jxxx" in shown
    assert "1970-01-01T00:00:01.000+00:00  broken  k  (t-0 offset 7, 1 attempts)" in shown


def test_image_ids_are_lines_each_id_once():
    assert image_ids_of([" a\n", "b\n", "\n", "a\n"]) == ["a", "b"]
    with pytest.raises(ValueError, match="is not an image id"):
        image_ids_of(["x" * 300])


def test_a_replayed_letter_is_the_message_that_died():
    broker = MemoryBroker()

    replay(Letters(dead()), MemoryOutbox(broker), "t.dlq", max_letters=9)

    (record,) = broker.log("t")
    assert (record.key, record.value, record.headers) == (b"k", b"v", (("h", b"1"),))


def test_cut_letters_letters_of_other_topics_and_other_messages_are_not_replayed():
    broker = MemoryBroker()
    letters = Letters(dead(truncated=True), dead(topic="elsewhere"))
    letters.records.append(Record(Partition("t.dlq", 0), 9, None, b"?", (), 0))

    done = replay(letters, MemoryOutbox(broker), "t.dlq", max_letters=9)

    assert broker.log("t") == broker.log("elsewhere") == []
    assert (done.truncated, done.foreign) == ({"broken": 1}, 2)


def test_a_limited_replay_says_where_the_next_begins():
    done = replay(Letters(dead(), dead(), dead()), MemoryOutbox(MemoryBroker()), "t.dlq", max_letters=1)

    assert (done.replayed, done.beyond_limit) == ({"broken": 1}, {"broken": 2})
    assert done.next_since == datetime.fromtimestamp(2, UTC)


def test_a_dry_run_counts_and_publishes_nothing():
    broker = MemoryBroker()

    done = replay(
        Letters(dead("a"), dead("b")), MemoryOutbox(broker), "t.dlq", codes=["a"], max_letters=9, dry_run=True
    )

    assert (done.replayed, done.passed_over) == ({"a": 1}, {"b": 1})
    assert broker.log("t") == []


# The command, against a real Kafka.


@dataclass
class Service:
    """Topics of a test's own, and the command that talks to them."""

    brokers: str
    topics: Topics

    def run(self, *words, stdin=""):
        return subprocess.run(
            [sys.executable, "-m", "workers.publish", *words, "--brokers", self.brokers],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def query(self, *words, stdin=""):
        return self.run("query", *words, "--topic-prefix", self.topics.prefix, stdin=stdin)

    def images(self, *words):
        return self.run("images", *map(str, words), "--topic-prefix", self.topics.prefix)

    @property
    def connection(self):
        return {"bootstrap_servers": self.brokers.split(",")}

    @contextmanager
    def answering(self, topic, answer):
        """Answer each record of a topic as this function says, from a thread."""
        reader = KafkaReader(self.connection, [topic])
        outbox = KafkaOutbox(self.connection, max_message_bytes=1 << 20)
        done = threading.Event()

        def work():
            while not done.is_set():
                for record in reader.poll(0.1):
                    for message in answer(record):
                        outbox.send(message).result(20)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            outbox.close(10)
            reader.close()

    def everything_in(self, topic):
        reader = KafkaReader(self.connection, [topic], start="beginning")
        records = []
        while not reader.caught_up():
            records += reader.poll(0.2)
        reader.close()
        return records


@pytest.fixture
def service(kafka_brokers, unique_prefix):
    topics = Topics(unique_prefix)
    names = [topics.images_new, topics.images_indexed, topics.rerank_requests, topics.rerank_responses]
    names += [topics.dead_letter(topics.images_new), f"{unique_prefix}rerank.responses.mine"]
    create_topics(kafka_brokers, dict.fromkeys(names, 1))
    return Service(kafka_brokers, topics)


def event_of(kind, record):
    return decode(kind, record.value, content_type_of(record.headers))


def ranking_backwards(topics):
    """A worker that ranks the last candidate first."""

    def answer(record):
        request = event_of(RerankRequest, record)
        indexes = range(len(request.candidates) - 1, -1, -1)
        results = [Result(index=i, id=request.names()[i], relevance_score=0.5, logit=float(i)) for i in indexes]
        response = RerankResponse(request_id=request.request_id, status="ok", results=results, **DIGESTS)
        yield Outgoing(request.reply_topic or topics.rerank_responses, record.key, encode(response))

    return answer


@pytest.mark.services
def test_a_query_prints_the_ranking_with_the_rank_before(service):
    with service.answering(service.topics.rerank_requests, ranking_backwards(service.topics)):
        done = service.query("a dog", "--candidates", "img-a,img-b")

    assert done.returncode == 0, done.stderr
    first, second = (line.split("│")[1:-1] for line in done.stdout.splitlines() if "img-" in line)
    assert [cell.strip() for cell in first] == ["1", "img-b", "0.5000", "+1.000", "2"]
    assert [cell.strip() for cell in second] == ["2", "img-a", "0.5000", "+0.000", "1"]


@pytest.mark.services
def test_a_query_as_json_is_the_response_and_nothing_else(service):
    reply_topic = f"{service.topics.prefix}rerank.responses.mine"
    with service.answering(service.topics.rerank_requests, ranking_backwards(service.topics)):
        done = service.query(
            "--image",
            "img-1",
            "--json",
            "--reply-topic",
            reply_topic,
            "--priority",
            "3",
            stdin="a dog, running\na cat\n",
        )

    assert [result["index"] for result in json.loads(done.stdout)["results"]] == [1, 0]
    (record,) = service.everything_in(service.topics.rerank_requests)
    sent = event_of(RerankRequest, record)
    assert (sent.query.image_id, sent.texts(), sent.priority) == ("img-1", ["a dog, running", "a cat"], 3)


@pytest.mark.services
@pytest.mark.parametrize("more", [[], ["--reply-topic", "refused"]], ids=["usual topic", "refused reply topic"])
def test_an_error_reply_is_a_sentence_and_exit_status_1(service, more):
    def answer(record):
        request_id = event_of(RerankRequest, record).request_id
        error = {"code": "too_many_candidates", "message": "2 candidates; at most 1"}
        response = RerankResponse(request_id=request_id, status="error", error=error, **DIGESTS)
        yield Outgoing(service.topics.rerank_responses, record.key, encode(response))

    with service.answering(service.topics.rerank_requests, answer):
        done = service.query("a dog", "--candidates", "a,b", *more)

    assert done.returncode == 1
    assert done.stderr == "error: too_many_candidates: 2 candidates; at most 1\n"


@pytest.mark.services
def test_no_reply_is_a_sentence_and_exit_status_1(service):
    done = service.query("a dog", "--candidates", "a", "--timeout-s", "0.5")

    assert done.returncode == 1
    assert "within 0.5 s; is the worker running and ready, with this topic prefix?" in done.stderr


def test_a_query_of_nothing_is_misuse():
    done = Service("127.0.0.1:9", Topics()).query(stdin="a\n")

    assert done.returncode == 2
    assert "give a text to rank images for, or --image" in done.stderr


@pytest.mark.services
@pytest.mark.parametrize("source", ["uri", "data"])
def test_images_are_published_and_waited_for(service, tmp_path, source):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"picture " + name.encode())
    seen = []

    def answer(record):
        event = event_of(ImageNew, record)
        seen.append(event)
        outcome = ImageIndexed(
            image_id=event.image_id, model="m", num_tokens=1, dtype="int8", num_bytes=1, content_sha256="0" * 64
        )
        yield Outgoing(service.topics.images_indexed, record.key, encode(outcome))

    with service.answering(service.topics.images_new, answer):
        done = service.images(tmp_path, "--as", source, "--prefix", "p/", "--wait")

    assert done.returncode == 0, done.stderr
    assert "2 published, 2 indexed (0 of them were stored already), under model m" in done.stderr
    assert ("INGEST_ALLOWED_SCHEMES=https,http,file and INGEST_FILE_ROOTS=" in done.stderr) == (source == "uri")
    assert {event.image_id for event in seen} == {"p/a", "p/b"}
    wanted = {tmp_path.joinpath("a.png").as_uri()} if source == "uri" else {b"picture a.png"}
    assert {event.uri if source == "uri" else event.data for event in seen if event.image_id == "p/a"} == wanted


@pytest.mark.services
def test_dead_letters_are_reported_by_cause_and_the_silent_are_named(service, tmp_path):
    for name in ("bad.png", "lost.png"):
        (tmp_path / name).write_bytes(b"1")
    images = service.topics.images_new

    def answer(record):
        if record.key == b"bad":
            letter = DeadLetter(images, 0, 0, record.value, record.key, record.headers, "E", "not_an_image", "no image")
            yield Outgoing(service.topics.dead_letter(images), letter.key, letter.value, letter.to_headers())

    with service.answering(images, answer):
        done = service.images(tmp_path, "--wait", "--timeout-s", "1")

    assert done.returncode == 1
    assert "1 dead letters, not_an_image: no image" in done.stderr
    assert "1 images have no outcome, and none arrived for 1 s: lost" in done.stderr


@pytest.mark.services
def test_a_backfill_publishes_a_listing_and_ends_with_its_balance(service, tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text("image_id,uri\n" + "".join(f"i{n},https://h/{n}\n" for n in range(30)) + "bad,\n")
    images, fails = service.topics.images_new, {b"i7"}

    def answer(record):
        if record.key in fails:
            letter = DeadLetter(images, 0, 0, record.value, record.key, record.headers, "E", "image_not_found", "404")
            yield Outgoing(service.topics.dead_letter(images), letter.key, letter.value, letter.to_headers())
            return
        image_id = record.key.decode()
        outcome = ImageIndexed(
            image_id=image_id, model="m", num_tokens=1, dtype="int8", num_bytes=1, content_sha256="0" * 64
        )
        yield Outgoing(service.topics.images_indexed, record.key, encode(outcome))

    def backfill(*words):
        state = ("--state", str(tmp_path / "state.json"), "--topic-prefix", service.topics.prefix)
        return service.run("backfill", str(listing), *state, *words)

    with service.answering(images, answer):
        first = backfill()
        fails.clear()
        again = backfill("--retry-failed")
        nothing = backfill()

    assert (first.returncode, again.returncode) == (1, 1)  # the bad row stays
    assert "31 rows = 30 published + 0 stored before + 0 duplicates + 1 without an image" in first.stderr
    assert "30 published = 29 indexed + 1 dead" in first.stderr
    assert "row 30: no address" in first.stderr
    assert "30 published and 1 again" in again.stderr
    assert "30 published = 30 indexed + 0 dead" in again.stderr
    assert "30 published = 30 indexed" in nothing.stderr
    assert len(service.everything_in(images)) == 31


@pytest.mark.services
def test_images_are_deleted_and_their_removal_is_waited_for(service):
    def answer(record):
        assert record.value is None
        yield Outgoing(service.topics.images_indexed, record.key, None)

    with service.answering(service.topics.images_new, answer):
        done = service.run("delete", "a", "b", "a", "--wait", "--topic-prefix", service.topics.prefix)

    assert done.returncode == 0, done.stderr
    assert "2 published, 2 removed" in done.stderr
    assert [record.key for record in service.everything_in(service.topics.images_new)] == [b"a", b"b"]


@pytest.mark.services
def test_dead_letters_go_back_to_their_topic(service):
    images = service.topics.images_new
    letters = [dead("a", topic=images, value=b"whole"), dead("a", topic=images, truncated=True)]
    outbox = KafkaOutbox(service.connection, max_message_bytes=1 << 20)
    for letter in letters:
        message = Outgoing(service.topics.dead_letter(images), letter.key, letter.value, letter.to_headers())
        outbox.send(message).result(20)
    outbox.close(10)

    shown = service.run("dead-letters", service.topics.dead_letter(images), "--limit", "1")
    assert "  a  k  (" in shown.stdout
    assert "1 more" in shown.stderr
    tried = service.run("replay-dead-letters", service.topics.dead_letter(images), "--dry-run")
    assert service.everything_in(images) == []
    done = service.run("replay-dead-letters", service.topics.dead_letter(images), "--code", "a")

    assert (tried.returncode, done.returncode) == (0, 0)
    assert "would be replayed" in tried.stdout
    assert [record.value for record in service.everything_in(images)] == [b"whole"]
    since = done.stderr.partition("--since ")[2].strip()
    again = service.run("replay-dead-letters", service.topics.dead_letter(images), "--since", since)
    assert again.stderr == "no dead letters\n"


@pytest.mark.services
def test_only_a_dead_letter_topic_that_exists_is_replayed(service):
    assert service.run("replay-dead-letters", service.topics.images_new).returncode == 2
    missing = service.run("replay-dead-letters", f"{service.topics.prefix}no.dlq")
    assert (missing.returncode, missing.stderr) == (1, f"the topic {service.topics.prefix}no.dlq does not exist\n")


def test_a_broker_that_does_not_answer_is_a_sentence_without_the_password(monkeypatch):
    monkeypatch.setenv("KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT")
    monkeypatch.setenv("KAFKA_SASL_MECHANISM", "PLAIN")
    monkeypatch.setenv("KAFKA_SASL_USERNAME", "somebody")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", "correct-horse")

    done = Service("127.0.0.1:9", Topics()).query("a dog", "--candidates", "a")

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "correct-horse" not in done.stdout + done.stderr
