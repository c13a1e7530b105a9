"""The contract of an image index, for the twin and for a real Postgres; and what a real one does when it fails."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest

from protocols.source_position import SourcePosition
from workers.errors import Misconfigured, Poison, Transient
from workers.index.client import PostgresIndex
from workers.index.memory import MemoryIndex
from workers.index.port import ImageRow, RemovedImage

DIM = 8
SHA, OTHER_SHA = "a" * 64, "b" * 64


@pytest.fixture
def postgres_index():
    """Make an index on a Postgres, closed at the end of the test."""
    made = []

    def make(url: str, digest: str, **options) -> PostgresIndex:
        index = PostgresIndex(url, model_digest=digest, **{"creates": True, "dim": DIM} | options)
        made.append(index)
        return index

    yield make
    for index in made:
        index.close()


@pytest.fixture(params=["memory", pytest.param("postgres", marks=pytest.mark.services)])
def index(request, unique_prefix, postgres_index):
    if request.param == "memory":
        return MemoryIndex()
    made = postgres_index(request.getfixturevalue("database_url"), unique_prefix)
    made.ping()
    return made


def vector(*values: float) -> np.ndarray:
    row = np.zeros(DIM, np.float32)
    row[: len(values)] = values
    return row / np.linalg.norm(row)


def row(image_id: str, *values: float, offset: int = 1, at: int = 1000, sha: str = SHA, **metadata: str) -> ImageRow:
    return ImageRow(image_id, SourcePosition(offset, at), sha, vector(*values) if values else None, metadata)


def removal(image_id: str, offset: int, at: int = 1000) -> RemovedImage:
    return RemovedImage(image_id, SourcePosition(offset, at))


def ids_near(index, *values: float, limit: int = 10, matching=None) -> list[str]:
    return [neighbour.image_id for neighbour in index.nearest(vector(*values), limit, matching or {})]


def test_the_nearest_images_come_first_with_their_cosines_and_metadata(index):
    index.apply([row("far", 0, 1), row("near", 1, 0.1, place="sea"), row("exact", 1), row("opposite", -1)])

    found = index.nearest(vector(1), 3, {})

    assert [neighbour.image_id for neighbour in found] == ["exact", "near", "far"]
    assert [neighbour.score for neighbour in found] == pytest.approx([1, 0.995, 0], abs=2e-3)
    assert found[1].metadata == {"place": "sea"}


def test_a_later_event_replaces_a_row_and_an_earlier_one_does_not(index):
    index.apply([row("a", 1, offset=5, name="second")])

    index.apply([row("a", 0, 1, offset=4, name="first")])
    assert index.find(["a"])[0].metadata == {"name": "second"}
    index.apply([row("a", 0, 1, offset=6, name="third")])
    assert index.find(["a"])[0].metadata == {"name": "third"}
    assert ids_near(index, 0, 1, limit=1) == ["a"]


def test_the_same_event_may_be_written_twice(index):
    index.apply([row("a", 1)])
    index.apply([row("a", 1)])

    assert index.count() == 1


def test_an_event_of_a_topic_that_was_created_again_replaces_a_row(index):
    index.apply([row("a", 1, offset=900, at=1000)])

    index.apply([row("a", 0, 1, offset=0, at=2000, name="new")])

    assert index.find(["a"])[0].metadata == {"name": "new"}


def test_a_removed_image_is_gone_and_no_earlier_event_brings_it_back(index):
    index.apply([row("a", 1, offset=1), row("b", 1, offset=2)])

    index.apply([removal("a", offset=3), removal("never-there", offset=4)])
    index.apply([row("a", 1, offset=2)])

    assert ids_near(index, 1) == ["b"]
    assert index.find(["a", "b", "never-there"])[::2] == [None, None]
    assert index.count() == 1


def test_a_removed_image_can_be_indexed_again(index):
    index.apply([row("a", 1, offset=1), row("b", 0, 1, offset=2)])
    index.apply([removal("a", offset=3)])

    index.apply([row("a", 1, offset=4)])

    assert ids_near(index, 1, limit=1) == ["a"]


def test_an_image_without_a_vector_keeps_the_one_of_the_same_content(index):
    index.apply([row("a", 1, offset=1, name="old")])

    assert index.apply([row("a", offset=2, name="new")]) == frozenset()

    assert index.find(["a"])[0].metadata == {"name": "new"}
    assert ids_near(index, 1) == ["a"]


def test_an_image_without_a_vector_for_its_content_is_reported_and_not_written(index):
    index.apply([row("a", 1, offset=1)])

    assert index.apply([row("a", offset=2, sha=OTHER_SHA), row("unknown", offset=3)]) == {"a", "unknown"}

    assert index.find(["a", "unknown"])[1] is None
    assert index.find(["a"])[0].content_sha256 == SHA


def test_a_filter_keeps_the_images_with_one_of_the_values_of_every_key(index):
    index.apply(
        [
            row("a", 1, place="sea", year="2024"),
            row("b", 1, 0.1, place="lake", year="2024"),
            row("c", 1, 0.2, place="sea", year="2025"),
            row("d", 1, 0.3),
        ]
    )

    assert ids_near(index, 1, matching={"place": ["sea"]}) == ["a", "c"]
    assert ids_near(index, 1, matching={"place": ["sea", "lake"], "year": ["2024"]}) == ["a", "b"]
    assert ids_near(index, 1, matching={"place": []}) == []
    assert ids_near(index, 1, matching={"place": ["'; DROP TABLE x; --"]}) == []


def test_rows_are_found_in_the_order_of_their_ids(index):
    index.apply([row("a", 1, name="one"), row("b", 1)])

    found = index.find(["b", "unknown", "a", "b"])

    assert [each and each.image_id for each in found] == ["b", None, "a", "b"]
    assert index.find([]) == []


def test_an_image_is_found_by_a_value_of_its_metadata(index):
    index.apply([row("a", 1, uri="https://x/1.jpg"), row("b", 1, uri="https://x/2.jpg")])

    assert index.ids_of("uri", ["https://x/2.jpg", "https://x/9.jpg", "https://x/1.jpg"]) == ["b", None, "a"]
    assert index.ids_of("uri", []) == []


@pytest.mark.parametrize("name", ["ünï 'quoted\"", "a\\b", "%s", "日本/1"])
def test_any_image_id_and_metadata_come_back_as_they_were(index, name):
    index.apply([ImageRow(name, SourcePosition(1, 1), SHA, vector(1), {name: name})])

    assert index.find([name])[0].metadata == {name: name}
    assert ids_near(index, 1, matching={name: [name]}) == [name]


def test_four_threads_at_once_get_their_own_answers(index):
    index.apply([row(f"{number}", *[0] * number, 1) for number in range(4)])

    def ask(number: int) -> bool:
        return all(ids_near(index, *[0] * number, 1, limit=1) == [str(number)] for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_the_twin_is_away_when_it_is_set_so_and_then_back():
    index = MemoryIndex()
    index.apply([row("a", 1)])

    index.away = True
    for call in (index.ping, index.count, lambda: index.find(["a"]), lambda: index.apply([row("a", 1)])):
        with pytest.raises(Transient):
            call()
    index.away = False

    assert index.count() == 1


@pytest.mark.services
def test_two_models_have_tables_of_their_own(database_url, unique_prefix, postgres_index):
    first, second = (postgres_index(database_url, unique_prefix + name) for name in "12")
    first.ping()
    second.ping()
    first.apply([row("a", 1)])

    assert first.count() == 1
    assert second.count() == 0


@pytest.mark.services
def test_two_workers_that_start_at_once_create_one_table(database_url, unique_prefix, postgres_index):
    both = [postgres_index(database_url, unique_prefix) for _ in range(2)]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda index: index.ping(), both))

    assert both[0].count() == 0


@pytest.mark.services
def test_another_width_under_the_same_digest_is_refused_with_the_remedy(database_url, unique_prefix, postgres_index):
    postgres_index(database_url, unique_prefix).ping()

    with pytest.raises(Misconfigured, match=r"holds vectors of 8 values .* DROP TABLE"):
        postgres_index(database_url, unique_prefix, dim=4).ping()


@pytest.mark.services
def test_a_reader_waits_for_the_table_that_the_index_worker_creates(database_url, unique_prefix, postgres_index):
    reader = postgres_index(database_url, unique_prefix, creates=False)

    with pytest.raises(Transient, match="the index worker creates the table"):
        reader.ping()
    postgres_index(database_url, unique_prefix).ping()

    reader.ping()


@pytest.mark.services
@pytest.mark.parametrize("value", ["\x00", "\ud800"])
def test_what_postgres_cannot_hold_is_poison_and_the_batch_is_not_written(
    database_url, unique_prefix, value, postgres_index
):
    index = postgres_index(database_url, unique_prefix)
    index.ping()

    with pytest.raises(Poison, match="cannot hold this image"):
        index.apply([row("good", 1), row("bad", 1, name=value)])

    assert index.count() == 0


@pytest.mark.services
def test_a_vector_that_is_not_finite_is_poison(database_url, unique_prefix, postgres_index):
    index = postgres_index(database_url, unique_prefix)
    index.ping()

    with pytest.raises(Poison, match="cannot hold this image"):
        index.apply([ImageRow("bad", SourcePosition(1, 1), SHA, np.full(DIM, np.nan, np.float32))])


@pytest.mark.services
def test_a_killed_postgres_is_transient_and_then_answers_again(private_postgres, unique_prefix, postgres_index):
    server = private_postgres()
    index = postgres_index(server.url, unique_prefix)
    index.ping()
    index.apply([row("a", 1)])

    server.kill()
    for call in (index.count, index.ping, lambda: index.apply([row("b", 1)])):
        with pytest.raises(Transient, match=r"Postgres at 127\.0\.0\.1"):
            call()
    server.start()

    assert index.count() == 1


@pytest.mark.services
def test_a_frozen_postgres_is_transient_within_the_time_limit(private_postgres, unique_prefix, postgres_index):
    server = private_postgres()
    index = postgres_index(server.url, unique_prefix, connect_timeout_s=2, timeout_s=1)
    index.ping()

    server.freeze()
    with pytest.raises(Transient):
        index.count()
    server.thaw()

    assert index.count() == 0


@pytest.mark.services
@pytest.mark.parametrize(
    ("old", "new"), [("/postgres", "/no_such_database"), ("//postgres@", "//no_such_user:hunter2@")]
)
def test_a_refused_login_is_misconfigured_and_shows_no_password(database_url, postgres_index, old, new):
    start, _, end = database_url.rpartition(old)
    index = postgres_index(start + new + end, "digest")

    with pytest.raises(Misconfigured, match="no_such") as caught:
        index.ping()

    assert "hunter2" not in str(caught.value)


def test_an_address_without_a_server_is_transient_and_shows_no_password(postgres_index):
    index = postgres_index("postgresql://user:hunter2@127.0.0.1:1/edje", "digest")

    with pytest.raises(Transient) as caught:
        index.ping()

    assert "hunter2" not in str(caught.value)


def test_what_is_no_address_is_misconfigured_and_shows_no_password(postgres_index):
    with pytest.raises(Misconfigured, match="DATABASE_URL is not a Postgres address") as caught:
        postgres_index("mysql://user:hunter2@host/edje", "digest")

    assert "hunter2" not in str(caught.value)


def test_vectors_wider_than_the_index_takes_are_misconfigured():
    with pytest.raises(Misconfigured, match="5000 values"):
        PostgresIndex("postgresql://localhost/edje", model_digest="digest", dim=5_000, creates=True)


@pytest.mark.services
def test_markers_of_removed_images_are_deleted_after_a_day(database_url, unique_prefix, postgres_index):
    index = postgres_index(database_url, unique_prefix)
    index.ping()
    index.apply([removal("old", 1), removal("young", 2)])
    with psycopg.connect(database_url) as connection:
        table = connection.execute("SELECT table_name FROM edje_models WHERE digest = %s", [unique_prefix]).fetchone()
        connection.execute(f"UPDATE {table[0]} SET changed_at = now() - interval '2 days' WHERE image_id = 'old'")

    assert index.delete_markers() == 1
