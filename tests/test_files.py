"""Files as a shared disk has them: many writers, planted links, and file systems that lack locks or syncs."""

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from seitpp import files


def replace_often(path: Path, number: int) -> None:
    for turn in range(50):
        files.replace_text(path, f"{number} {turn}\n" * 1000)


def test_processes_replace_one_file_at_the_same_time(tmp_path: Path) -> None:
    fork, path = multiprocessing.get_context("fork"), tmp_path / "file"
    processes = [fork.Process(target=replace_often, args=(path, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert len({*path.read_text().splitlines()}) == 1 and [*tmp_path.iterdir()] == [path]


def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept/file"
    kept.parent.mkdir()
    kept.write_text("content")
    link, folder = tmp_path / "link", tmp_path / "folder"
    folder.symlink_to(kept.parent)
    for change in (files.write_file, files.append_file):
        link.symlink_to(kept)
        with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
            change(link, b"other")
        link.unlink()
    link.symlink_to(kept)
    files.replace_text(link, "new")  # the link itself is replaced
    files.remove_folder(folder)
    (tmp_path / ".report.0.tmp").symlink_to(kept)
    files.remove_temporary(tmp_path)
    assert kept.read_text() == "content" and not link.is_symlink() and link.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "link"]


def test_only_another_owner_means_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(number: int) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", refuse)

    for number in (errno.EACCES, errno.EAGAIN):
        answer(number)
        assert files.lock(tmp_path / "lock") is None
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        answer(number)
        with pytest.warns(UserWarning, match=r"lock: no locks here \(.*\): start nothing else on this folder"):
            held = files.lock(tmp_path / "lock")
        files.unlock(held)


def test_folders_that_cannot_be_synced_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answer = os.fsync, errno.EINVAL

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(answer, os.strerror(answer))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.replace_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    answer = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.replace_text(tmp_path / "file", "text")
