"""Backfills: listings of any kind, flow control, going on after a kill, and a balance that adds up."""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from protocols.dead_letters import DeadLetter
from protocols.encoding import content_type_of, decode, encode
from protocols.events import ImageIndexed, ImageNew
from protocols.topics import Topics
from workers.bus.memory import MemoryBroker, MemoryOutbox
from workers.client import Client, answer_topics
from workers.errors import Misconfigured
from workers.ports import Outgoing
from workers.publish.backfill import Backfill, Checkpoint, FailedIds
from workers.publish.listing import BadRow, fingerprint_of, rows_of
from workers.publish.output import print_balance

TOPICS = Topics()
NOW = datetime(2026, 12, 1, tzinfo=UTC)


def uris(rows):
    return [row.uri if isinstance(row, ImageNew) else row for row in rows]


# --- listings ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image_id,uri\na,https://h/1.jpg\nb,https://h/2.jpg\n", [("a", "https://h/1.jpg"), ("b", "https://h/2.jpg")]),
        ("\ufeffURL;x\n".replace(";", ",") + "https://h/d/1.jpg,7\n", [("d/1", "https://h/d/1.jpg")]),
        ("https://h/1.jpg\nhttps://h/2.png\n", [("1", "https://h/1.jpg"), ("2", "https://h/2.png")]),
        ('"bucket","a%20b/1.jpg","5"\n', [("a b/1", "s3://bucket/a b/1.jpg")]),
    ],
    ids=["ids and addresses", "another header", "addresses", "S3 Inventory"],
)
def test_a_csv_is_read_in_the_forms_that_people_have(tmp_path, text, expected):
    path = tmp_path / "list.csv"
    path.write_text(text)

    assert [(row.image_id, row.uri) for row in rows_of(str(path))] == expected


def test_rows_without_an_image_are_reported_and_the_others_are_read(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("image_id,uri\na,\n" + "x" * 300 + ",https://h/1\nonly\nb,https://h/2\n")

    rows = list(rows_of(str(path)))

    assert [type(row) for row in rows] == [BadRow, BadRow, BadRow, ImageNew]
    assert (rows[0].number, rows[0].reason) == (0, "no address")


def test_a_parquet_file_is_read_in_batches_from_any_row_on(tmp_path):
    path = tmp_path / "list.parquet"
    table = pyarrow.table({"uri": [f"https://h/{n}.jpg" for n in range(25_000)], "caption": ["c"] * 25_000})
    pyarrow.parquet.write_table(table, path)

    assert uris(rows_of(str(path), skip=24_998)) == ["https://h/24998.jpg", "https://h/24999.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"name\nx\n", "no column uri"),
        ("a.parquet", b"not parquet", "a.parquet"),
        ("missing.csv", None, "missing.csv"),
    ],
)
def test_a_listing_that_cannot_be_read_is_a_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(Misconfigured, match=sentence):
        list(rows_of(str(path)))


def test_a_folder_is_read_in_the_same_order_each_time(tmp_path):
    for name in ("b/2.jpg", "b/1.png", "a.jpg", "c/notes.txt", ".hidden/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    found = [Path(uri).name for uri in uris(rows_of(str(tmp_path)))]

    assert found == ["a.jpg", "1.png", "2.jpg"]
    assert [Path(uri).name for uri in uris(rows_of(str(tmp_path), skip=2))] == ["2.jpg"]


# --- runs ---


class Workers(MemoryOutbox):
    """An outbox behind which images are indexed at once, or dead-lettered by their address."""

    def __init__(self, broker: MemoryBroker, is_bad=lambda image: False) -> None:
        super().__init__(broker)
        self.broker = broker
        self.is_bad = is_bad
        self.held: list[Outgoing] = []
        self.holds = False
        self.published: Counter[str] = Counter()

    def send(self, message):
        sent = super().send(message)
        self.held.append(message)
        if not self.holds:
            self.answer()
        return sent

    def answer(self) -> None:
        messages, self.held = self.held, []
        for message in messages:
            image = decode(ImageNew, message.value, content_type_of(message.headers))
            self.published[image.image_id] += 1
            if self.is_bad(image):
                letter = DeadLetter(
                    TOPICS.images_new, 0, 0, message.value, message.key, message.headers, "E", "image_not_found", "404"
                )
                self.broker.append(Outgoing("images.new.dlq", letter.key, letter.value, letter.to_headers()))
                continue
            indexed = ImageIndexed(
                image_id=image.image_id, model="m", num_tokens=1, dtype="int8", num_bytes=1, content_sha256="0" * 64
            )
            self.broker.append(Outgoing("images.indexed", message.key, encode(indexed)))


class Answers:
    """The answer topics, read from an instant on; here from the beginning, as after a long tolerance of clocks."""

    def __init__(self, broker):
        partitions = [(topic, number) for topic in answer_topics(TOPICS)[:2] for number in range(broker.num_partitions)]
        self.broker, self.positions = broker, dict.fromkeys(partitions, 0)

    def poll(self, timeout_s):
        records = []
        for partition, position in self.positions.items():
            log = self.broker.partition_log(*partition)
            records += log[position:]
            self.positions[partition] = len(log)
        return records

    def unknown_topics(self):
        return []

    def close(self):
        """Nothing is held open."""


class Killed(Exception):
    """The process ends here."""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.publish.backfill.POLL_S", 0.0)
    broker = MemoryBroker()
    state = tmp_path / "state.json"
    failed = FailedIds(tmp_path / "state.json.failed")

    def start(rows, outbox, *, max_in_work=1_000, stored=(), on_progress=lambda balance, number: None, listing="l"):
        checkpoint = Checkpoint.load(state, listing, NOW)
        client = Client(outbox, Answers(broker), TOPICS)
        backfill = Backfill(
            client,
            checkpoint,
            are_stored=lambda ids: [each in stored for each in ids],
            max_in_work=max_in_work,
            save=lambda: checkpoint.save(state, NOW),
            note_failed=failed.append,
            on_progress=on_progress,
        )
        backfill._save_if_due = backfill.save  # as if every turn took long
        if callable(rows):
            backfill.publish(rows(checkpoint.balance.rows))
        else:
            backfill.retry(rows, failed.read())
        return checkpoint.balance

    start.broker, start.failed, start.state = broker, failed, state
    return start


def listing(number, first=0):
    return lambda skip: iter([ImageNew(image_id=f"i{n}", uri=f"https://h/{n}") for n in range(first + skip, number)])


def adds_up(balance):
    return (
        balance.rows == balance.published + balance.stored + balance.duplicates + balance.bad
        and balance.published == balance.finished()
    )


def test_every_row_is_accounted_for(run):
    rows = [*listing(1_200)(0), BadRow(1_200, "no address"), ImageNew(image_id="i7", uri="https://h/7")]

    balance = run(lambda skip: iter(rows[skip:]), Workers(run.broker), stored={"i7", "i8"})

    assert (balance.rows, balance.published, balance.stored, balance.bad) == (1_202, 1_198, 3, 1)
    assert adds_up(balance)
    assert not print_balance(balance, run.state)


def test_no_more_images_are_in_work_than_allowed(run):
    workers = Workers(run.broker)
    workers.holds = True
    most = 0

    def progress(balance, num_in_work):
        nonlocal most
        most = max(most, num_in_work)
        workers.answer()

    balance = run(listing(3_000), workers, max_in_work=100, on_progress=progress)

    assert most <= 100
    assert balance.indexed == 3_000


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_ends_with_an_exact_balance(run, seed):
    rng = random.Random(seed)
    workers = Workers(run.broker, lambda image: image.image_id.endswith("3"))
    workers.holds = True

    def progress(balance, num_in_work):
        if rng.random() < 0.6:
            workers.answer()
        if rng.random() < 0.08:
            raise Killed

    for _ in range(1_000):
        try:
            balance = run(listing(6_000), workers, max_in_work=700, on_progress=progress)
        except Killed:
            continue
        break

    assert (balance.rows, balance.published) == (6_000, 6_000)
    assert (balance.indexed, balance.dead) == (5_400, {"image_not_found": 600})
    assert adds_up(balance)
    assert len(workers.published) == 6_000
    assert len(run.failed.read()) == 600


def test_failed_images_are_published_again_and_others_of_the_topic_are_not(run):
    workers = Workers(run.broker, lambda image: image.image_id in ("i3", "i5"))
    run(listing(10), workers)
    others = Workers(run.broker, lambda image: True)
    others.send(Outgoing("images.new", b"theirs", encode(ImageNew(image_id="theirs", uri="https://h/x"))))
    letters = [
        DeadLetter.from_message(record.key, record.value, record.headers)
        for number in range(run.broker.num_partitions)
        for record in run.broker.partition_log("images.new.dlq", number)
    ]
    workers.is_bad = lambda image: image.image_id == "i5"

    balance = run(letters, workers)

    assert (balance.indexed, balance.dead, balance.retried) == (9, {"image_not_found": 1}, {"image_not_found": 2})
    assert adds_up(balance)
    assert workers.published["theirs"] == 0


def test_a_checkpoint_of_another_listing_or_of_something_else_is_refused(run):
    run(listing(10), Workers(run.broker))
    with pytest.raises(Misconfigured, match="belongs to another listing"):
        run(listing(10), Workers(run.broker), listing="other")
    for content in (b"", b"[]", b"{}", json.dumps({"listing": "l", "saved_at": "x", "balance": {}}).encode()):
        run.state.write_bytes(content)
        with pytest.raises(Misconfigured, match="is not a checkpoint"):
            run(listing(10), Workers(run.broker))


def test_the_fingerprint_changes_with_the_file(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("uri\nhttps://h/1\n")
    before = fingerprint_of(str(path))
    path.write_text("uri\nhttps://h/1\nhttps://h/2\n")

    assert fingerprint_of(str(path)) != before
    with pytest.raises(Misconfigured, match="No such file"):
        fingerprint_of(str(tmp_path / "missing"))
