"""Digests follow the content; large files that were not written since are not read again."""

import hashlib
import logging
import os

import pytest

from data import digests
from data.digests import digests_of


@pytest.fixture
def reads(monkeypatch):
    """Records the name of each file that is hashed. Digests are remembered from one byte on."""
    names, read = [], hashlib.file_digest
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1)
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, kind: names.append(stream.name[-1]) or read(stream, kind)
    )
    monkeypatch.setattr(digests.time, "time_ns", lambda: 1 << 62)  # long after the files were written
    return names


@pytest.fixture
def files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"text of {name}")
    return [tmp_path / "a", tmp_path / "b"]


def expected(files):
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_large_files_are_read_once_and_again_after_a_write(files, tmp_path, reads):
    memory = tmp_path / "cache" / "digests.json"
    assert digests_of(files, memory) == expected(files)
    assert digests_of(files, memory) == digests_of(files[:1], memory) + digests_of(files[1:], memory) == expected(files)
    assert reads == ["a", "b"]
    dates = files[0].stat()
    files[0].write_text("texT of a")
    os.utime(files[0], ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert digests_of(files, memory) == expected(files)
    assert reads == ["a", "b", "a"] and [file.name for file in memory.parent.iterdir()] == ["digests.json"]


def test_partial_files_of_killed_processes_are_removed(files, tmp_path, reads):
    old, new = tmp_path / "digests.json.11", tmp_path / "digests.json.12"
    for partial in (old, new):
        partial.write_text("{")
    os.utime(old, (1, 1))
    digests_of(files, tmp_path / "digests.json")
    assert not old.exists() and new.exists()


def test_small_files_are_always_read(files, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "REMEMBERED_BYTES", 1000)
    memory = tmp_path / "digests.json"
    assert digests_of(files, memory) == digests_of(files, memory) == expected(files)
    assert reads == ["a", "b"] * 2 and not memory.exists()


def test_a_file_that_was_just_written_is_not_remembered(files, tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests.time, "time_ns", lambda: files[1].stat().st_ctime_ns)
    digests_of(files, tmp_path / "digests.json")
    digests_of(files, tmp_path / "digests.json")
    assert reads == ["a", "b"] * 2


@pytest.mark.parametrize("memory", ["a/digests.json", "broken"])
def test_a_memory_that_cannot_be_used_is_no_error(files, tmp_path, reads, caplog, memory):
    caplog.set_level(logging.INFO)
    (tmp_path / "broken").write_text("{")
    assert digests_of(files, tmp_path / memory) == expected(files)
    assert ("cannot be written" in caplog.text) == (memory != "broken")
