"""Atomic writes of files and directories."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from edje import files
from edje.files import draft_directory, draft_file, replace_directory, write_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_directory(path, *contents):
    with draft_directory(path) as draft:
        for content in contents:
            (draft / content).write_text(content)


@pytest.fixture(params=["exchange", "two renames"])
def replacing(request, monkeypatch):
    """Both ways to replace a directory: with and without a file system that can swap two names."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    return request.param


@pytest.mark.parametrize("content", [b"\x00new", "n\u00e9w"])
def test_a_file_is_replaced_and_leaves_no_temporary_file(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text("a former and longer content")

    write_file(path, content)

    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(tmp_path) == ["file.json"]


def test_a_failed_write_keeps_the_former_file(tmp_path):
    path = tmp_path / "rows.npy"
    path.write_text("former")

    def write_half():
        with draft_file(path) as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()

    assert path.read_text() == "former"
    assert names(tmp_path) == ["rows.npy"]


def test_a_temporary_file_keeps_the_suffix(tmp_path):
    with draft_file(tmp_path / "rows.npy") as draft:
        assert draft.suffix == ".npy"
        assert draft.parent == tmp_path


def test_a_file_has_the_rights_that_the_user_gives_to_new_files(tmp_path):
    write_file(tmp_path / "file", "text")
    (tmp_path / "other").touch()

    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "link.txt").symlink_to("real.txt")

    write_directory(tmp_path / "link", "new")
    write_file(tmp_path / "link.txt", "new")

    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_directory_appears_at_the_end_with_its_parents(tmp_path):
    path = tmp_path / "deep" / "model"

    with draft_directory(path) as draft:
        (draft / "new").touch()
        assert not path.exists()

    assert names(path) == ["new"]
    assert names(path.parent) == ["model"]


def test_a_directory_replaces_the_former_one(tmp_path, replacing):
    path = tmp_path / "model"
    write_directory(path, "former", "both")

    write_directory(path, "both", "new")

    assert names(path) == ["both", "new"]
    assert names(tmp_path) == ["model"]


def test_a_directory_replaces_a_file(tmp_path, replacing):
    (tmp_path / "model").write_text("a file")

    write_directory(tmp_path / "model", "new")

    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failed_directory_keeps_the_former_one(tmp_path):
    path = tmp_path / "model"
    write_directory(path, "former")

    with pytest.raises(FileNotFoundError):
        write_directory(path, "no/such/folder")

    assert names(path) == ["former"]
    assert names(tmp_path) == ["model"]


def test_the_former_directory_comes_back_if_the_last_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_directory(path, "former")
    rename = Path.rename

    def fail_for_the_new_one(self, target):
        if target == path and (self / "new").exists():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="No space"):
        write_directory(path, "new")

    assert names(path) == ["former"]
    assert names(tmp_path) == ["model"]


def test_the_name_exists_at_every_moment_of_a_replacement(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_directory(path, "former")
    draft = tmp_path / "draft"
    draft.mkdir()
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the directory was renamed away"))

    replace_directory(draft, path)

    assert names(path) == []
    assert names(tmp_path) == ["model"]


def test_every_user_can_read_a_directory_that_was_written_for_one(tmp_path):
    with draft_directory(tmp_path / "model") as draft:
        (draft / "folder").mkdir()
        for each in (draft / "weights", draft / "folder" / "graph"):
            each.touch(mode=0o600)
        draft.chmod(0o700)

    modes = {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.rglob("*") if each.is_file()}
    assert modes == {0o644}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


def abandon(draft, age_s):
    changed = draft.stat().st_mtime - age_s
    os.utime(draft, (changed, changed))


def test_the_draft_of_a_killed_process_goes_with_the_next_write(tmp_path):
    for name in (".model-0a1b2c3d.draft", ".model-[x]-0a1b2c3d.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
        abandon(tmp_path / name, age_s=120)

    write_directory(tmp_path / "model-[x]", "new")

    assert names(tmp_path) == [".model-0a1b2c3d.draft", "model-[x]"]


@pytest.mark.parametrize("age_s", [0, 120])
def test_the_draft_of_a_running_process_stays(tmp_path, age_s):
    draft = tmp_path / ".file-0a1b2c3d.draft"
    draft.touch()
    abandon(draft, age_s)

    with draft.open() as file:
        if age_s:
            fcntl.flock(file, fcntl.LOCK_EX)
        write_file(tmp_path / "file", "new")

    assert draft.exists()
