"""A file is whole or not there, and what was there before stays until then."""

import os

import pytest

from spectra.runs.files import PARTIAL, write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.txt"
    for content in (b"first", b"", b"\x00second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_size) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("named") or replace(*paths))
    write_whole(tmp_path / "a.txt", b"12345")
    assert events[:2] == [5, "named"]
    assert len(events) == 3  # and then the folder


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_leaves_what_was_there(call, error, tmp_path, monkeypatch):
    def fail(*given):
        raise error

    path = tmp_path / "a.txt"
    write_whole(path, b"before")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / f"a.txt{PARTIAL}").write_bytes(b"a longer half of something")
    write_whole(tmp_path / "a.txt", b"whole")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.txt", b"whole")]
