"""Atomic writing of a directory."""

import pytest

from trt.build.draft_directory import DirectoryExists, draft_of

MARK = "manifest.json"


def write(target, text, *, replace=False):
    with draft_of(target, MARK, replace=replace) as draft:
        (draft / MARK).write_text(text)
        (draft / text).touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_when_the_block_has_ended(tmp_path):
    target = tmp_path / "deep" / "engine"

    with draft_of(target, MARK, replace=False) as draft:
        (draft / MARK).write_text("new")
        assert not target.exists()

    assert (target / MARK).read_text() == "new"
    assert names(target.parent) == ["engine"]


def test_a_failure_leaves_nothing_and_the_former_one_in_its_place(tmp_path):
    target = tmp_path / "engine"
    write(target, "former")

    with pytest.raises(FileNotFoundError):
        write(target, "no/such/folder", replace=True)

    assert names(target) == ["former", MARK]
    assert names(tmp_path) == ["engine"]


def test_a_former_directory_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "engine", "former")

    write(tmp_path / "engine", "new", replace=True)

    assert names(tmp_path / "engine") == [MARK, "new"]
    assert names(tmp_path) == ["engine"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "engine").mkdir()

    write(tmp_path / "engine", "new")

    assert names(tmp_path / "engine") == [MARK, "new"]


def test_an_existing_directory_is_not_overwritten_by_default(tmp_path):
    write(tmp_path / "engine", "former")

    with pytest.raises(DirectoryExists, match="--force"):
        write(tmp_path / "engine", "new")


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("a file"), lambda path: (path / "other").mkdir(parents=True)]
)
def test_an_unrelated_directory_is_never_overwritten(tmp_path, make):
    target = tmp_path / "engine"
    make(target)

    with pytest.raises(DirectoryExists, match="choose another directory"):
        write(target, "new", replace=True)

    assert target.exists()


def test_a_directory_written_meanwhile_by_another_process_is_not_overwritten(tmp_path):
    target = tmp_path / "engine"

    def write_slowly():
        with draft_of(target, MARK, replace=False):
            write(target, "faster")

    with pytest.raises(DirectoryExists, match="--force"):
        write_slowly()

    assert names(target) == ["faster", MARK]
    assert names(tmp_path) == ["engine"]
