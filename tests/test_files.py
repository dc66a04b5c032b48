"""Files that appear whole or not at all, and the paths that cannot be written to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from icseg.files import check_file, remove_partial_files, written_whole


def test_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.nii.gz"
    path.write_text("old")

    def write() -> None:
        with written_whole(path) as temporary:
            assert temporary.name.endswith(".nii.gz")
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_replaces_the_old_file_with_usual_permissions(tmp_path):
    path, usual = tmp_path / "file", tmp_path / "usual"
    path.write_text("old")
    usual.touch()
    with written_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode == usual.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, usual]


def test_a_durable_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    path, events, fsync, replace = tmp_path / "file", [], os.fsync, Path.replace

    def synchronise(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(Path, "replace", rename)
    with written_whole(path, durable=True) as temporary:
        temporary.write_text("new")
    assert events == [path.stat().st_ino, "rename", tmp_path.stat().st_ino]
    with written_whole(path):
        pass
    assert events[3:] == ["rename"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    with written_whole(tmp_path / "file") as temporary:
        other = temporary.with_name(temporary.name + "0")
        other.write_text("half")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_messages_name_the_path_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^path must lie in an existing folder, got none/file\.json$"):
        written_whole("none/file.json").__enter__()
    with pytest.raises(IsADirectoryError, match=r"^path must be that of a file, got the folder \.$"):
        check_file(".")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(PermissionError, match=r"^path must lie in a folder that can be written to, got file$"):
        check_file("file")
